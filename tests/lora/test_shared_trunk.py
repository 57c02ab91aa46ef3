"""Several roles on one trunk: each trains, and is read, as if it were alone; the trunk never changes."""

import pytest
import torch

from icegrt.config import OptimizerConfig, PPOConfig
from icegrt.packing import pack
from icegrt.ppo.batch_plan import ActionBatch
from icegrt.ppo.losses import CriticLoss, PolicyLoss
from icegrt.ppo.scoring import LogprobScorer, score_values
from icegrt.roles.micro_batch import MicroBatch
from icegrt.roles.role import Role
from tests.helpers import lora_cases as lora
from tests.helpers import tiny_models as tiny

pytestmark = pytest.mark.usefixtures("cluster")
SCORER = LogprobScorer(1.0, 16)
LEARNS = OptimizerConfig(lr=1e-2)


def batch():
    return pack([[2, 3, 4], [5, 6]], [[7, 8], [9, 10, 11]])


def work(role):
    values_A = torch.linspace(-3.0, -1.0, batch().n_actions)
    if role.model.head_kind == "lm":
        columns = {"old_logprob_A": values_A, "advantage_A": values_A.flip(0) + 2}
        loss = PolicyLoss(PPOConfig(), role, 0.0, None, SCORER)
    else:
        columns = {"old_value_A": values_A, "return_A": values_A.flip(0)}
        loss = CriticLoss(role, None)
    return [MicroBatch(batch().extended(ActionBatch, **columns), loss)]


def roles(names, dtype, recompute="none"):
    """Return trainable roles on one trunk, and its trunk as the reference."""
    trunk = lora.trunk(tiny.causal_lm(0), dtype=dtype, recompute=recompute)
    heads = {"actor": "lm", "critic": "scalar"}
    built = {name: lora.adapted_role(trunk, None, heads[name], learns=LEARNS, name=name) for name in names}
    return built | {"reference": Role("reference", trunk)}


def train(names, dtype, recompute="none"):
    built = roles(names, dtype, recompute)
    for _ in range(3):
        for name in names:
            built[name].train_step(work(built[name]))
            SCORER(built["reference"], [batch()])
    return {name: tiny.parameters(role) for name, role in built.items()}


@pytest.mark.parametrize(
    ("dtype", "recompute"), [(torch.float32, "none"), (torch.bfloat16, "none"), (torch.float32, "full")]
)
def test_two_roles_learn_on_one_trunk_as_each_would_alone(dtype, recompute):
    together = train(["actor", "critic"], dtype, recompute)
    start = roles(["actor", "critic"], dtype)
    for name in ("actor", "critic"):
        assert tiny.same(together[name], train([name], dtype, recompute)[name])
        assert not tiny.same(together[name], tiny.parameters(start[name]))
    assert tiny.same(together["reference"], tiny.parameters(start["reference"]))


def test_a_pass_uses_its_own_adapter_whoever_came_before():
    built = roles(["actor", "critic"], torch.float32)
    for name in ("actor", "critic"):
        built[name].train_step(work(built[name]))
    expected, _ = SCORER(built["actor"], [batch()])
    values, _ = score_values(built["critic"], [batch()])
    trunk_alone, _ = SCORER(roles([], torch.float32)["reference"], [batch()])
    for _ in range(2):
        assert torch.equal(SCORER(built["reference"], [batch()])[0], trunk_alone)
        assert torch.equal(score_values(built["critic"], [batch()])[0], values)
        assert torch.equal(SCORER(built["actor"], [batch()])[0], expected)
    assert not torch.equal(expected, trunk_alone)


def test_ddp_and_optimizer_hold_adapter_and_head_alone():
    built = roles(["actor", "critic"], torch.bfloat16)
    for name in ("actor", "critic"):
        role = built[name]
        own = sum(p.numel() for p in role.model.parameters())
        held = sum(len(buffer.params) for ddp in role.ddps for buffer in ddp.buffers)
        assert held == len(list(role.model.parameters()))
        masters = [p for group in role.optimizer.param_groups for p in group["params"]]
        assert sum(p.numel() for p in masters) == own
    trunk = {id(p) for p in built["reference"].model.parameters()}
    assert all(id(p) not in trunk for name in ("actor", "critic") for p in built[name].model.parameters())


def test_a_new_adapter_depends_on_seed_and_role_and_not_on_its_targets():
    trunk = lora.trunk(tiny.causal_lm(0))
    fewer = lora.AdapterSpec(4, 6.0, ("k_proj", "down_proj"))

    def tensors(name, spec=lora.SPEC):
        return tiny.by_hugging_face_name(lora.adapted_role(trunk, None, name=name, spec=spec), lambda p: p)

    actor = tensors("actor")
    assert all(torch.equal(x, actor[name]) for name, x in tensors("actor", fewer).items())
    for name, x in tensors("critic").items():
        bound = x.shape[1] ** -0.5
        if "lora_A" in name:
            assert not torch.equal(x, actor[name]) and 0.8 * bound < x.abs().max() <= bound
        else:
            assert not x.any()
