"""Dropped responses over data-parallel ranks: which minibatches are no step is one decision of all."""

import math

import pytest
import torch

from icegrt.config import RewardCallConfig
from icegrt.model.hf import exporter
from icegrt.ppo.trainer import PPOTrainer
from tests.helpers import tiny_models as tiny
from tests.helpers.layout_cases import LAYOUTS, config
from tests.helpers.ranks import launch

KEPT = [row["prompt"] for row in tiny.PROMPTS[:3]]


def few(samples):
    """No score for most prompts."""
    return [1.0 if s.row["prompt"] in KEPT and s.index == 0 else math.nan for s in samples]


def dropping(folder, layout):
    changes = {"iterations": 2, "minibatches": 5, "ptx_coef": 0.0, "ptx_data": []}
    settings = config(folder / layout, layout, lr=1e-4, reward=RewardCallConfig(on_error="drop"), **changes)
    with PPOTrainer(settings, tiny.causal_lm(0), tiny.tokenizer(), [tiny.scorer(1), few], tiny.PROMPTS) as run:
        steps = list(run)
        weights = dict(exporter.export_tensors(run.actor.model, torch.float32))
        if run.cluster.is_main:
            counts = [(s.empty_steps, s.dropped_responses, s.skipped_steps) for s in steps]
            torch.save((counts, weights), folder / f"{layout}.pt")


@pytest.mark.timeout(600)
def test_a_minibatch_is_left_out_by_all_ranks_or_none(tmp_path):
    for layout in ("one", "dp2"):
        launch(LAYOUTS[layout][0], dropping, tmp_path, layout)
    (expected_counts, expected), (counts, weights) = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "dp2"))
    assert counts == expected_counts and all(0 < empty < 2 * 5 and dropped > 5 for empty, dropped, _ in expected_counts)
    square = sum(float((x.double() ** 2).sum()) for x in expected.values())
    off = sum(float(((weights[n] - x).double() ** 2).sum()) for n, x in expected.items())
    assert (off / square) ** 0.5 <= 1e-5
