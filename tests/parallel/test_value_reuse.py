"""The critic's first step gives the values, in every layout: the bits of the layout's run with an inference pass."""

import pytest
import torch

from icegrt.config import ParallelConfig
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.layout import Layout
from tests.helpers import tiny_models as tiny
from tests.helpers.layout_cases import LAYOUTS, config, results_by_layout, step_metrics, trainer

CASES = ["dp2", "tp2_sp", "pp2_uneven"] + [pytest.param(x, marks=pytest.mark.long) for x in ("pp2_virtual", "tp2_pp2")]


def run_both(folder, layout):
    """Two iterations with an inference pass of the critic, and two without."""
    results = []
    with Cluster.open(Layout.of(ParallelConfig(**LAYOUTS[layout][1]))) as cluster:
        for reuses in (False, True):
            keys = {"minibatches": 1, "iterations": 2, "ptx_coef": 0.0, "ptx_data": [], "lam_value": 0.9}
            settings = config(folder / f"{layout}_{reuses}", layout, lr=1e-3, reuse_update_values=reuses, **keys)
            with trainer(settings, LAYOUTS[layout][2]) as run:
                steps = [step_metrics(run.step()) for _ in range(2)]
                weights = {role.name: tiny.by_hugging_face_name(role, lambda p: p) for role in run.roles}
                results.append((steps, weights))
        if cluster.is_main:
            torch.save(results, folder / f"{layout}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What a layout gave, run once."""
    folder = tmp_path_factory.mktemp("values")
    return results_by_layout(folder, run_both)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", CASES)
def test_a_layout_gives_the_bits_of_its_run_with_the_inference_pass(layout, results):
    (steps, weights), (others, other_weights) = results(layout)
    assert steps == others
    assert weights.keys() == other_weights.keys() == {"actor", "critic"}
    assert all(tiny.same(weights[name], other_weights[name]) for name in weights)
    # One process has other micro-batches or shards, which round differently.
    expected_steps, expected = results("one_tied" if LAYOUTS[layout][2] else "one")[1]
    assert all(tiny.gap(other_weights[name], expected[name])[0] <= 1e-5 for name in weights)
    for step, other in zip(others, expected_steps, strict=True):
        for figure in ("value_loss", "policy_loss", "value_explained_variance", "grad_norm_critic"):
            assert step[figure] == pytest.approx(other[figure], rel=1e-5, abs=1e-4), figure
    assert expected_steps[0]["grad_norm_critic"] > 0
