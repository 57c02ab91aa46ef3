"""Dropped responses over data-parallel ranks: which minibatches are no step is one decision of all."""

import math

import pytest
import torch

from icegrt.config import RewardCallConfig
from icegrt.model.hf import exporter
from icegrt.ppo.trainer import PPOTrainer
from tests.helpers import tiny_models as tiny
from tests.helpers.layout_cases import LAYOUTS, config, step_metrics
from tests.helpers.ranks import launch

KEPT = [row["prompt"] for row in tiny.PROMPTS[:3]]


def few(samples):
    """No score for most prompts."""
    return [1.0 if s.row["prompt"] in KEPT and s.index == 0 else math.nan for s in samples]


def one(samples):
    """A score for one response of the iteration."""
    return [1.0 if (s.group, s.index) == (0, 0) else math.nan for s in samples]


def reusing(folder):
    """Two iterations of one scored response with inference passes, and two with the passes of the update alone."""
    outcomes = []
    for reuses in (False, True):
        keys = {"reuse_update_values": reuses, "reuse_update_logprob": reuses, "minibatches": 1, "iterations": 2}
        keys |= {"ptx_coef": 0.0, "ptx_data": [], "reward": RewardCallConfig(on_error="drop", workers=0)}
        settings = config(folder / str(reuses), "dp2", lr=1e-3, **keys)
        watch = CountedActions()
        models = tiny.causal_lm(0), tiny.tokenizer(), [tiny.scorer(1), one], tiny.PROMPTS
        with PPOTrainer(settings, *models, callbacks=[watch]) as run:
            steps = [step_metrics(run.step()) for _ in range(2)]
            outcomes.append((steps, [tiny.parameters(role) for role in run.roles], watch.counts))
    (steps, weights, counts), (others, other_weights, other_counts) = outcomes
    assert steps == others and all(tiny.same(*pair) for pair in zip(weights, other_weights, strict=True))
    assert [s["dropped_responses"] for s in steps] == [9, 9] and steps[0]["grad_norm_critic"] > 0
    assert counts == other_counts and all(min(by_rank) == 0 < max(by_rank) for by_rank in counts)


class CountedActions:
    """The counted actions of each rank, by iteration."""

    def __init__(self):
        self.counts = []

    def on_scores(self, run, experience):
        by_rank = [None, None]
        counted = sum(batch.n_counted_actions for batch in experience.plan.batches)
        torch.distributed.all_gather_object(by_rank, counted)
        self.counts.append(by_rank)


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


@pytest.mark.timeout(600)
def test_a_rank_without_a_counted_response_takes_the_steps_that_give_values_and_log_probs(tmp_path):
    launch(2, reusing, tmp_path)
