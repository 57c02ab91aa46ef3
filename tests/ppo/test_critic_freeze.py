"""Frozen modules of the critic: no gradient, no optimizer state, no part in the norm, and the same bits after a run."""

import pytest
import torch

from icegrt.config import OptimizerConfig, PPOConfig
from icegrt.errors import ConfigError
from icegrt.model.build import build_model
from icegrt.packing import pack
from icegrt.ppo.batch_plan import ActionBatch
from icegrt.ppo.losses import CriticLoss
from icegrt.ppo.trainer import PPOTrainer
from icegrt.roles.freezing import freeze
from icegrt.roles.micro_batch import MicroBatch
from icegrt.roles.optimizer import inner_optimizers
from icegrt.roles.role import TrainableRole
from tests.helpers import stage_cases as cases
from tests.helpers import tiny_models as tiny

ATTENTION = ".self_attention."


def trainer(home, run, *overrides):
    return PPOTrainer(PPOConfig.load(None, cases.ppo_keys(home, run, *overrides)))


def optimizer_bytes(role):
    """Return the bytes of Adam's moments."""
    states = [state for inner in inner_optimizers(role.optimizer) for state in inner.optimizer.state.values()]
    return sum(x.nbytes for state in states for name, x in state.items() if name.startswith("exp_avg"))


def gradient_bytes(role):
    return sum(buffer.grad_data.nbytes for ddp in role.ddps for buffer in ddp.buffers)


def test_frozen_attention_keeps_its_bits_and_costs_no_optimizer_state(home, tmp_path):
    sizes = {}
    for frozen in ("[]", "[attention]"):
        with trainer(home, tmp_path / frozen, f"ppo.critic.freeze={frozen}") as run:
            before = tiny.parameters(run.critic)
            run.train()
            after = tiny.parameters(run.critic)
            kept = {name for name, x in after.items() if torch.equal(x, before[name])}
            attention = {name for name in after if ATTENTION in name}
            assert kept == (attention if frozen != "[]" else set())
            sizes[frozen] = optimizer_bytes(run.critic), gradient_bytes(run.critic)
            frozen_bytes = sum(after[name].nbytes for name in attention)
    moments, gradients = (full - part for full, part in zip(sizes["[]"], sizes["[attention]"], strict=True))
    assert moments == 2 * frozen_bytes
    assert abs(gradients - frozen_bytes) <= 4 * 64 * 2  # Megatron pads its buffers


def test_a_frozen_critic_resumes_to_the_bit_and_refuses_another_list(home, tmp_path):
    keys = ("ppo.critic.freeze=[attention, embedding]", "ppo.iterations=3")
    with trainer(home, tmp_path / "whole", *keys) as run:
        run.train()
        expected = tiny.parameters(run.critic)
    with trainer(home, tmp_path / "half", *keys) as run:
        run.step()
    with pytest.raises(ConfigError, match=r"ppo\.critic\.freeze is \['mlp'\], but .* made with \['attention', 'embed"):
        trainer(home, tmp_path / "half", "ppo.critic.freeze=[mlp]", "ppo.iterations=3", "ppo.run.resume=true")
    with trainer(home, tmp_path / "half", *keys, "ppo.run.resume=true") as run:
        run.train()
        assert tiny.same(tiny.parameters(run.critic), expected)


def test_adapters_of_frozen_modules_do_not_train(home, tmp_path):
    keys = ("ppo.sharing=lora", "ppo.lora.rank=2", "ppo.reward_model=", "ppo.critic.init=actor")
    with trainer(home, tmp_path / "run", *keys, "ppo.critic.freeze=[attention]") as run:
        before = tiny.parameters(run.critic)
        run.train()
        after = tiny.parameters(run.critic)
        kept = {name for name, x in after.items() if torch.equal(x, before[name])}
        assert kept == {name for name in after if ATTENTION in name} and kept
        assert any(".mlp." in name for name in after)
        moved = tiny.parameters(run.actor)
        assert all(x.any() for name, x in moved.items() if ATTENTION in name)


@pytest.mark.parametrize(
    ("module", "targets", "rest"),
    [("norm", "[q_proj, up_proj]", "attention and mlp"), ("attention", "[up_proj, down_proj]", "mlp")],
)
def test_a_module_without_adapters_is_refused(module, targets, rest, home, tmp_path):
    keys = ("ppo.sharing=lora", "ppo.lora.rank=2", "ppo.reward_model=", "ppo.critic.init=actor")
    keys = (*keys, f"ppo.lora.target_modules={targets}", f"ppo.critic.freeze=[mlp, {module}]")
    with pytest.raises(ConfigError, match=rf"critic\.freeze: .* `{module}`, .* only those of {rest} can be frozen"):
        trainer(home, tmp_path / "run", *keys)


def test_an_unknown_module_is_refused(home, tmp_path):
    with pytest.raises(ConfigError, match=r"ppo\.critic\.freeze: `attn` is no kind of module; expected .* attention"):
        trainer(home, tmp_path / "run", "ppo.critic.freeze=[attn]")


def work(role):
    batch = pack([[2, 3, 4], [5, 6]], [[7, 8], [9, 10, 11]])
    return_A = torch.linspace(-3.0, 2.0, batch.n_actions)
    batch = batch.extended(ActionBatch, old_value_A=torch.zeros(batch.n_actions), return_A=return_A)
    return [MicroBatch(batch, CriticLoss(role, None))]


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(
    ("modules", "frozen"),
    [
        (["attention"], ("self_attention",)),
        (["embedding", "norm"], ("embedding", "norm.")),
        (["attention", "mlp", "embedding", "norm"], ("self_attention", "mlp.", "embedding", "norm.")),
    ],
)
def test_gradients_of_what_trains_are_those_of_a_whole_model(modules, frozen, recompute, cluster):
    def role(names):
        # Qwen3 has norms of queries and keys, which are part of attention.
        source = tiny.scorer(3, "qwen3")
        model = build_model(source, "scalar", cluster, dtype=torch.float32, recompute=recompute)
        freeze(model, names, "ppo.critic.freeze")
        return TrainableRole("critic", model, OptimizerConfig(lr=1e-2), 10)

    whole, part = role([]), role(modules)
    for each in (whole, part):
        each.zero_gradients()
        each.accumulate(work(each))
    gradients = {name: p.main_grad.clone() for name, p in whole.model.named_parameters()}
    trained = {name: p.main_grad for name, p in part.model.named_parameters() if p.requires_grad}
    assert trained.keys() == {name for name in gradients if not any(word in name for word in frozen)}
    assert "head.weight" in trained
    for name, gradient in trained.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-6, atol=1e-7)
    expected = torch.stack([gradients[name].norm() for name in trained]).norm()
    assert part.train_step(work(part)).grad_norm == pytest.approx(float(expected), rel=1e-5)
