"""Corrections, aggregations and positive examples are one update in every layout: their sums are over all ranks."""

import pytest
import torch

from icegrt.config import ParallelConfig
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.layout import Layout
from tests.helpers import tiny_models as tiny
from tests.helpers.layout_cases import (
    LAYOUTS,
    RunRecorder,
    config,
    results_by_layout,
    step_metrics,
    trainer,
    write_ptx,
)

POSITIVE = {"positive_nll_coef": 0.2, "positive_nll_threshold": 0.15}
SETTINGS = {
    "tis": {"correction": "tis", "correction_level": "sequence", "loss_aggregation": "sequence", **POSITIVE},
    "dis": {
        "correction": "dis", "correction_level": "sequence", "loss_aggregation": "constant", "kl_logprobs": "rollout",
        "overlong_buffer": 4,
    },
    "tis of tokens": {"correction": "tis", "tis_cap": 0.9},
    "tis at rest": {"correction": "tis", "lr": 0.0},
    "dis of tokens": {"correction": "dis", **POSITIVE},
}  # fmt: skip
FIGURES = (
    "policy_loss",
    "positive_nll",
    "overlong_penalty_mean",
    "correction_ratio_mean",
    "correction_ratio_max",
    "correction_fraction",
    "correction_sample_share",
    "kl_nats_per_response",
)


def steps_of(folder, layout):
    """Take a step of each of SETTINGS; rank 0 writes gradients, weights and metrics."""
    results = {}
    with Cluster.open(Layout.of(ParallelConfig(**LAYOUTS[layout][1]))) as cluster:
        for name, settings in SETTINGS.items():
            watch = RunRecorder()
            # Of the three minibatches one has fewer responses than ranks or micro-batches.
            keys = config(folder / f"{layout}_{name}", layout, iterations=1, minibatches=3, ptx_coef=0.0, **settings)
            with trainer(keys, LAYOUTS[layout][2], [watch]) as run:
                step = step_metrics(run.step())
                weights = tiny.by_hugging_face_name(run.actor, lambda p: p)
                results[name] = (watch.gradients["actor"], weights, step)
        if cluster.is_main:
            torch.save(results, folder / f"{layout}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What a layout gave, run once."""
    folder = tmp_path_factory.mktemp("losses")
    write_ptx(folder)
    return results_by_layout(folder, steps_of)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", ["dp2", "tp2_sp", "pp2_uneven", pytest.param("tp2_sp_dp2", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_layout_takes_the_step_of_one_process(name, layout, results):
    (gradients, weights, step), (expected_gradients, expected_weights, expected) = (
        results(x)[name] for x in (layout, "one")
    )
    assert tiny.gap(gradients, expected_gradients)[0] <= 1e-5
    assert tiny.gap(weights, expected_weights)[0] <= 1e-5
    for figure in FIGURES:
        assert (figure in step) == (figure in expected)
        if figure in expected:
            assert step[figure] == pytest.approx(expected[figure], abs=1e-4), figure
    if name == "tis at rest":
        assert (step["ratio_min"], step["ratio_max"]) == (1.0, 1.0)
    seen = {"tis": "positive_nll", "dis": "overlong_penalty_mean", "dis of tokens": "positive_nll"}
    assert expected[seen.get(name, "correction_ratio_mean")] > 0
