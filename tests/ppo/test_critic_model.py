"""A critic of its own: of another size or checkpoint than the actor, through a whole run."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from icegrt.commands import export
from icegrt.config import ExportConfig, PPOConfig
from icegrt.errors import CheckpointError, ConfigError
from icegrt.ppo.trainer import PPOTrainer
from icegrt.residency import PARAMETERS
from tests.helpers import stage_cases as cases
from tests.helpers import tiny_models as tiny

OTHER_SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def critic(tmp_path_factory):
    """A checkpoint with a value head, narrower and deeper than the actor."""
    return cases.save_model(tmp_path_factory.mktemp("critic") / "model", tiny.scorer(4, **OTHER_SIZE), tiny.tokenizer())


def trainer(home, run, *overrides):
    return PPOTrainer(PPOConfig.load(None, cases.ppo_keys(home, run, *overrides)))


def weights(role):
    """Return copies of a role's weights, which may be on the host."""
    with role.placement.hold(PARAMETERS):
        return tiny.parameters(role)


def test_a_critic_of_another_size_trains_resumes_and_is_exported(home, critic, tmp_path):
    keys = (f"ppo.critic.model={critic}", "ppo.offload.roles=all")
    with trainer(home, tmp_path / "whole", *keys) as run:
        assert run.critic.model.architecture.num_layers == 3
        initial = weights(run.critic)
        run.train()
        expected = weights(run.actor), weights(run.critic)
        assert not any(torch.equal(x, initial[name]) for name, x in expected[1].items())
    with trainer(home, tmp_path / "half", *keys) as run:
        run.step()
    with trainer(home, tmp_path / "half", *keys, "ppo.run.resume=true") as run:
        assert run.done_steps == 1
        run.train()
        assert tiny.same(weights(run.actor), expected[0])
        assert tiny.same(weights(run.critic), expected[1])
    out = tmp_path / "exported"
    export.run(ExportConfig(run=str(tmp_path / "whole"), role="critic", out=str(out)))
    exported = AutoModelForSequenceClassification.from_pretrained(out)
    assert torch.equal(exported.score.weight, expected[1]["head.weight"])
    with trainer(home, tmp_path / "next", f"ppo.critic.model={out}") as run:
        assert tiny.same(weights(run.critic), expected[1])


def test_a_critic_of_the_actors_size_has_the_metrics_of_one_passed_in_python(home, tmp_path):
    scorer = cases.save_model(tmp_path / "scorer", tiny.scorer(9), tiny.tokenizer())
    with trainer(home, tmp_path / "key", f"ppo.critic.model={scorer}") as run:
        by_key = run.step()
    with PPOTrainer(PPOConfig.load(None, cases.ppo_keys(home, tmp_path / "argument")), critic=scorer) as run:
        by_argument = run.step()
    assert by_key.value_loss == by_argument.value_loss and by_key.policy_loss == by_argument.policy_loss


def test_a_whole_critic_beside_adapters(home, critic, tmp_path):
    keys = ("ppo.sharing=lora", "ppo.lora.rank=2", "ppo.reward_model=", f"ppo.critic.model={critic}")
    with trainer(home, tmp_path / "run", *keys) as run:
        before = tiny.parameters(run.critic)
        run.step()
        assert run.critic.model.adapter is None and run.actor.model.adapter is not None
        assert not any(torch.equal(x, before[name]) for name, x in tiny.parameters(run.critic).items())
        expected = tiny.parameters(run.critic)
    with trainer(home, tmp_path / "run", *keys, "ppo.run.resume=true") as run:
        assert tiny.same(tiny.parameters(run.critic), expected)


def test_a_missing_value_head_needs_a_word(home, tmp_path):
    small = cases.save_model(tmp_path / "small", tiny.causal_lm(2, **OTHER_SIZE), tiny.tokenizer())
    with pytest.raises(CheckpointError, match=r"small: no value head .*`ppo\.critic\.new_head`"):
        trainer(home, tmp_path / "run", f"ppo.critic.model={small}")
    with trainer(home, tmp_path / "run", f"ppo.critic.model={small}", "ppo.critic.new_head=true") as run:
        assert not run.critic.model.head.weight.any()
        assert run.step().value_loss > 0


def test_a_new_head_without_a_model_is_refused(home, tmp_path):
    with pytest.raises(ConfigError, match=r"ppo\.critic\.new_head is true, but ppo\.critic\.model names no checkpoint"):
        trainer(home, tmp_path / "run", "ppo.critic.new_head=true")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 50}, "the critic .* has a vocabulary of 50 tokens, the actor .* one of 61"),
        ({"max_position_embeddings": 8}, "beyond the critic's context of 8"),
    ],
)
def test_a_critic_that_cannot_read_the_responses_is_refused_by_name(changes, message, home, tmp_path):
    other = cases.save_model(tmp_path / "other", tiny.scorer(2, **changes))
    with pytest.raises(ConfigError, match=message):
        trainer(home, tmp_path / "run", f"ppo.critic.model={other}")


def test_a_critic_with_another_tokenizer_is_refused_by_name(home, tmp_path):
    other = cases.save_model(tmp_path / "other", tiny.scorer(2), tiny.tokenizer())
    path = tmp_path / "other" / "tokenizer.json"
    path.write_text(path.read_text().replace('"a":', '"@":'))
    with pytest.raises(ConfigError, match=r"the critic .* map text to different token ids"):
        trainer(home, tmp_path / "run", f"ppo.critic.model={other}")
