"""What only a GPU switches on (reduction beside the backward pass, gathering beside the forward pass), over gloo."""

from functools import partial

import pytest
import torch

from icegrt.roles import role
from icegrt.roles.optimizer import wrap
from icegrt.rollout.types import Sampling
from tests.helpers import tiny_models as tiny
from tests.helpers.layout_cases import LAYOUTS, config, parity, trainer, write_ptx
from tests.helpers.ranks import launch

# Of few parameters, so that a model has several buckets.
overlapped = partial(wrap, overlap=True, bucket_size=4000)


def overlapped_parity(folder, layout):
    role.wrap = overlapped
    parity(folder, layout)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "layout", ["dp2", pytest.param("tp2_dp2", marks=pytest.mark.long), pytest.param("pp2_dp2", marks=pytest.mark.long)]
)
def test_overlapped_collectives_change_nothing(layout, tmp_path):
    write_ptx(tmp_path)
    plain = "one_tied" if LAYOUTS[layout][2] else "one"
    launch(1, parity, tmp_path, plain)
    launch(LAYOUTS[layout][0], overlapped_parity, tmp_path, layout)
    ours, theirs = (torch.load(tmp_path / f"{name}.pt", weights_only=False) for name in (layout, plain))
    assert ours["tokens"] == theirs["tokens"]
    for role_name, expected in theirs["weights"].items():
        assert tiny.gap(ours["gradients"][role_name], theirs["gradients"][role_name])[1] <= 1e-5
        assert tiny.gap(ours["weights"][role_name], expected)[0] <= 1e-5
    assert (ours["rest"]["ratio_min"], ours["rest"]["ratio_max"]) == (1.0, 1.0)


def saved_and_few(folder, layout):
    """After a step, with parameters that nobody has gathered yet: a rollout that leaves a rank without a sequence, and
    a checkpoint that another run goes on from to the same bits."""
    if layout == "dp2":
        role.wrap = overlapped
    settings = {"iterations": 9, "checkpoint_every": 2}
    with trainer(config(folder / layout, layout, **settings), False) as run:
        run.step()
        assert any(len(ddp.bucket_groups) > 1 for ddp in run.actor.ddps) == (layout == "dp2")
        drawn = run.components.engine.generate([[5, 6, 7]], 1, Sampling(max_new_tokens=6, seed=1))
        run.step()
        last = run.step()
        after = {r.name: tiny.by_hugging_face_name(r, lambda p: p) for r in run.roles}
    with trainer(config(folder / layout, layout, **settings, run={"resume": True}), False) as run:
        assert run.done_steps == 2
        run.step()
        again = {r.name: tiny.by_hugging_face_name(r, lambda p: p) for r in run.roles}
        if run.cluster.is_main:
            assert all(tiny.same(again[name], weights) for name, weights in after.items())
            torch.save(([r.tokens for r in drawn], last.policy_loss, last.value_loss), folder / f"{layout}.pt")


def at_rest_in_bf16(folder):
    """The critic's fp32 head has buckets of its own beside those of its bf16 trunk."""
    role.wrap = overlapped
    settings = config(folder / "run", "dp2", lr=0.0, ptx_coef=0.0, ppo_epochs=2, run={"dtype": "bf16"})
    with trainer(settings, False) as run:
        step = run.step()
    assert (step.ratio_min, step.ratio_max) == (1.0, 1.0) and step.grad_norm_actor > 0 and step.grad_norm_critic > 0


@pytest.mark.timeout(300)
def test_overlapped_ranks_at_rest_in_bf16_have_a_ratio_of_exactly_one(tmp_path):
    write_ptx(tmp_path)
    launch(2, at_rest_in_bf16, tmp_path)


@pytest.mark.timeout(600)
def test_parameters_on_their_way_are_waited_for(tmp_path):
    write_ptx(tmp_path)
    for layout in ("one", "dp2"):
        launch(LAYOUTS[layout][0], saved_and_few, tmp_path, layout)
    one, two = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "dp2"))
    assert two[0] == one[0]
    assert two[1:] == pytest.approx(one[1:], abs=1e-4)
