"""Shared prompts in every kind of layout: the same run as one process, and the same pass as without sharing."""

import dataclasses

import pytest
import torch

from tests.helpers import tiny_models as tiny
from tests.helpers.layout_cases import LAYOUTS, RunRecorder, config, step_metrics, trainer
from tests.helpers.ranks import launch
from tests.helpers.shared_prompts import SharedAndUnshared

FIGURES = ("policy_loss", "value_loss", "kl_nats_per_response", "score_mean", "grad_norm_actor", "grad_norm_critic")
LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("tp2", "pp2_virtual", "tp2_sp_dp2", "pp2_dp2")]


def shared_pass(folder, layout, recompute):
    """One iteration by prompt; it compares itself with the unshared pass, and rank 0 writes what it computed."""
    settings = config(
        folder / layout, layout, iterations=1, checkpoint_every=9, samples_per_prompt=3, ptx_coef=0.0,
        minibatch_by="prompt", token_budget=56,
    )  # fmt: skip
    settings = dataclasses.replace(settings, run=dataclasses.replace(settings.run, recompute=recompute))
    recorder, comparison = RunRecorder(), SharedAndUnshared()
    with trainer(settings, LAYOUTS[layout][2], [recorder, comparison]) as run:
        step = step_metrics(run.step())
        (plan,) = comparison.plans
        assert any(batch.group_sizes for batch in plan.batches), "a rank shares nothing"
        weights = {r.name: tiny.by_hugging_face_name(r, lambda p: p) for r in run.roles}
        if run.cluster.is_main:
            torch.save((recorder.tokens, recorder.gradients, weights, step), folder / f"{layout}.pt")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", ["tp2_sp", "pp2", "dp2", *LONG])
def test_a_layout_shares_prompts_as_one_process_does(layout, tmp_path):
    one = "one_tied" if LAYOUTS[layout][2] else "one"
    launch(1, shared_pass, tmp_path, one, "none")
    launch(LAYOUTS[layout][0], shared_pass, tmp_path, layout, "selective" if layout == "tp2_sp" else "none")
    (tokens, gradients, weights, step), (same, expected_gradients, expected_weights, expected) = (
        torch.load(tmp_path / f"{name}.pt", weights_only=False) for name in (layout, one)
    )
    assert tokens == same, "other tokens were sampled"
    for role in expected_weights:
        assert tiny.gap(gradients[role], expected_gradients[role])[0] <= 1e-5
        assert tiny.gap(weights[role], expected_weights[role])[0] <= 1e-5
    for figure in FIGURES:
        assert step[figure] == pytest.approx(expected[figure], abs=1e-4, rel=1e-4), figure
