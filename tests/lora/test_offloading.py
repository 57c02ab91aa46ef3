"""Offloaded runs with adapters: the trunk leaves the device for a model of its own alone, and comes back with it."""

from functools import partial

import pytest

from icegrt.config import CriticConfig, OptimizerConfig, ParallelConfig
from icegrt.ppo.trainer import PPOTrainer
from icegrt.residency import GRADIENTS, OPTIMIZER, PARAMETERS, Residency
from icegrt.roles import role as roles
from icegrt.roles.optimizer import wrap
from tests.helpers import tiny_models as tiny
from tests.helpers.ranks import launch


def make(folder, **changes):
    optimizer = OptimizerConfig(lr=1e-2)
    critic = CriticConfig(init="actor", optimizer=optimizer)
    settings = {"iterations": 2, "prompts_per_iteration": 3, "sharing": "lora", "lora": {"rank": 3}, "critic": critic}
    config = tiny.ppo_config(folder, **(settings | changes))
    return PPOTrainer(config, tiny.causal_lm(0), tiny.tokenizer(), [tiny.scorer(1)], tiny.PROMPTS)


def train(folder, **changes):
    """Run to the end. Returns copies of the parameters of all roles."""
    with make(folder, **changes) as run:
        run.train()
        tensors = {}
        for name, role in run.components.roles.items():
            with role.placement.hold(PARAMETERS):
                tensors |= {f"{name}.{n}": x for n, x in tiny.parameters(role).items()}
        return tensors


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_offloaded_run_has_the_bits_of_a_resident_one(dtype, tmp_path, monkeypatch):
    expected = train(tmp_path / "resident", run={"dtype": dtype})
    move, seen = Residency.move, []

    def watched(residency):
        move(residency)
        seen.append((frozenset().union(*residency._held), residency.resident()))

    monkeypatch.setattr(Residency, "move", watched)
    assert tiny.same(train(tmp_path / "offloaded", run={"dtype": dtype}, offload={"roles": "all"}), expected)
    trunk = ("reference", PARAMETERS)
    for held, resident in seen:
        assert resident == held
        learns = {(role, PARAMETERS) for role in ("actor", "critic")} & held
        assert trunk in held or not learns
    assert any(("reward", PARAMETERS) in held and trunk not in held for held, _ in seen)
    assert any({("actor", kind) for kind in (PARAMETERS, GRADIENTS, OPTIMIZER)} | {trunk} == held for held, _ in seen)


def overlapped(folder, layout, dtype):
    """Runs of one layout: with overlapped collectives, and with state that leaves the device."""
    changes = {"parallel": ParallelConfig(**layout), "run": {"dtype": dtype}}
    expected = train(folder / "plain", **changes)
    roles.wrap = partial(wrap, overlap=True, bucket_size=500)
    resident, offloaded = (train(folder / n, offload={"roles": n}, **changes) for n in ("none", "all"))
    assert tiny.same(offloaded, resident) and len(resident) > 40
    # Other buckets add the gradient's norm up in another order.
    assert tiny.gap(resident, expected)[0] < (1e-6 if dtype == "fp32" else 1e-4)


@pytest.mark.parametrize(
    ("layout", "dtype"), [({}, "bf16"), ({"tensor": 2, "sequence_parallel": True}, "fp32")], ids=["dp2", "tp2_sp"]
)
def test_ranks_that_share_adapters_overlap_their_collectives(layout, dtype, tmp_path):
    launch(2, overlapped, tmp_path, layout, dtype)
