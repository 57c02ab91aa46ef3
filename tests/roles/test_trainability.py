"""Parameters say whether they train, and what Megatron calls in a training pass belongs to the role that trains."""

import pytest
import torch

from icegrt.config import OptimizerConfig, PPOConfig
from icegrt.model.build import build_model
from icegrt.packing import pack
from icegrt.ppo.batch_plan import ActionBatch
from icegrt.ppo.losses import PolicyLoss
from icegrt.ppo.scoring import LogprobScorer
from icegrt.roles.micro_batch import MicroBatch
from icegrt.roles.role import Role, TrainableRole
from tests.helpers import tiny_models as tiny

pytestmark = pytest.mark.usefixtures("cluster")
SCORER = LogprobScorer(1.0, 16)


def work(role):
    batch = pack([[2, 3, 4], [5, 6]], [[7, 8], [9, 10, 11]])
    values_A = torch.linspace(-3.0, -1.0, batch.n_actions)
    policy = batch.extended(ActionBatch, old_logprob_A=values_A, advantage_A=values_A.flip(0) + 2)
    return [MicroBatch(policy, PolicyLoss(PPOConfig(), role, 0.0, None, SCORER))]


def changed(role, before):
    return {name for name, p in tiny.parameters(role).items() if not torch.equal(p, before[name])}


def test_only_parameters_that_require_a_gradient_are_trained():
    model = build_model(tiny.causal_lm(0), "lm", tiny.current_cluster(), dtype=torch.float32)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    trained = {name for name, _ in model.named_parameters() if "mlp" in name}
    role = TrainableRole("actor", model, OptimizerConfig(lr=1e-2), 10)
    before = tiny.parameters(role)
    role.train_step(work(role))
    assert changed(role, before) == trained and len(trained) > 2


def test_a_frozen_role_on_a_trained_model_changes_nothing_of_its_training():
    trained = {}
    for shared in (False, True):
        role = tiny.role(tiny.causal_lm(0), learns=OptimizerConfig(lr=1e-2))
        if shared:
            reader = Role("reference", role.model)
            SCORER(reader, [item.batch for item in work(role)])
        role.train_step(work(role))
        trained[shared] = tiny.parameters(role)
    assert tiny.same(trained[True], trained[False])
    assert role.model.config.finalize_model_grads_func is None and role.model.config.no_sync_func is None
