"""Models in memory pass the checks of checkpoint folders, at every entry point."""

import contextlib

import pytest
import torch

import icegrt
from icegrt.config import CriticConfig, RewardConfig, SFTConfig
from icegrt.errors import CheckpointError, ConfigError
from icegrt.ppo.trainer import PPOTrainer
from icegrt.training.reward_model import RewardTrainer
from icegrt.training.sft import SFTTrainer
from tests.helpers import stage_cases as cases
from tests.helpers import tiny_models as tiny

UP = "model.layers.1.mlp.up_proj.weight"
EXTRA_EOS = 40


def sft(folder, model, tokenizer):
    return SFTTrainer(SFTConfig.load(None, [f"sft.run.dir={folder}"]), model, tokenizer, cases.sft_rows())


def reward(folder, model, tokenizer):
    return RewardTrainer(RewardConfig.load(None, [f"reward.run.dir={folder}"]), model, tokenizer, cases.ranking_rows())


def ppo(folder, actor, tokenizer, source=tiny.count_letters, **roles):
    config = tiny.ppo_config(folder, iterations=1, critic=CriticConfig(init="actor"))
    return PPOTrainer(config, actor, tokenizer, source, tiny.PROMPTS, **roles)


def ppo_reference(folder, model, tokenizer):
    return ppo(folder, tiny.causal_lm(), tokenizer, reference=model)


def ppo_reward(folder, model, tokenizer):
    return ppo(folder, tiny.causal_lm(), tokenizer, model)


def ppo_critic(folder, model, tokenizer):
    return ppo(folder, tiny.causal_lm(), tokenizer, critic=model)


def engine(folder, model, tokenizer):
    return contextlib.nullcontext(icegrt.RolloutEngine(icegrt.load_actor(model), tokenizer))


LANGUAGE_MODELS = {"sft": sft, "reward": reward, "ppo": ppo, "ppo reference": ppo_reference, "engine": engine}
SCORERS = {"reward": reward, "ppo reward": ppo_reward, "ppo critic": ppo_critic}
OPENED = [(f"{name}, lm", build, tiny.causal_lm) for name, build in LANGUAGE_MODELS.items()]
OPENED += [(f"{name}, scorer", build, tiny.scorer) for name, build in SCORERS.items()]


@pytest.mark.parametrize("form", ["folder", "memory"])
@pytest.mark.parametrize(("bad", "dtype"), [(float("nan"), torch.float32), (float("-inf"), torch.bfloat16)])
@pytest.mark.parametrize(("build", "model"), [c[1:] for c in OPENED], ids=[c[0] for c in OPENED])
def test_a_weight_that_is_not_finite_is_refused_by_name(build, model, bad, dtype, form, run_dir, tmp_path):
    broken = model().to(dtype)
    with torch.no_grad():
        broken.get_parameter(UP)[5, 3] = bad
    where = "the given Llama"
    if form == "folder":
        where = broken = cases.save_model(tmp_path / "broken", broken, tiny.tokenizer())
    with pytest.raises(CheckpointError, match=f"{where}.*: tensor `{UP}` holds NaN or infinity"):
        build(run_dir, broken, tiny.tokenizer())
    assert not run_dir.exists() and not run_dir.parent.exists()


def test_a_score_head_that_is_not_finite_is_refused(run_dir):
    for build in SCORERS.values():
        scorer = tiny.scorer()
        with torch.no_grad():
            scorer.score.weight[0, 0] = float("inf")
        with pytest.raises(CheckpointError, match=r"tensor `score\.weight` holds NaN or infinity"):
            build(run_dir, scorer, tiny.tokenizer())
        assert not run_dir.parent.exists()


@pytest.mark.parametrize("form", ["folder", "memory"])
@pytest.mark.parametrize("build", [sft, reward, ppo, engine], ids=lambda build: build.__name__)
def test_a_tokenizer_larger_than_the_vocabulary_is_refused_with_the_token_that_is_too_many(
    build, form, run_dir, tmp_path
):
    model, tokenizer = tiny.causal_lm(vocab_size=40), tiny.tokenizer()
    if form == "folder":
        model = cases.save_model(tmp_path / "small", model, tokenizer)
    first = tokenizer.decode([40])
    with pytest.raises(
        ConfigError, match=rf"has 61 tokens, .* only 40; .* the first token that is too many is '{first}'"
    ):
        build(run_dir, model, tokenizer)
    assert not run_dir.parent.exists()


@pytest.mark.parametrize("form", ["folder", "memory"])
@pytest.mark.parametrize("build", [sft, reward, ppo, engine], ids=lambda build: build.__name__)
def test_every_stage_ends_answers_at_the_eos_ids_of_the_generation_config(build, form, tmp_path):
    model, tokenizer = tiny.causal_lm(), tiny.tokenizer()
    model.generation_config.eos_token_id = [tiny.EOS, EXTRA_EOS]
    if form == "folder":
        model = cases.save_model(tmp_path / "model", model, tokenizer)
    with build(tmp_path / "run", model, tokenizer) as run:
        if build is engine:
            stops = run.decoder.stop_ids
        elif build is ppo:
            stops = run.components.engine.decoder.stop_ids
        else:
            stops = run.stop_ids
    assert sorted(stops) == [tiny.EOS, EXTRA_EOS]


@pytest.mark.parametrize("form", ["folder", "memory"])
@pytest.mark.parametrize("build", [sft, reward, ppo, engine], ids=lambda build: build.__name__)
def test_an_eos_id_beyond_the_tokenizer_is_refused(build, form, run_dir, tmp_path):
    model = tiny.causal_lm(vocab_size=80)
    model.generation_config.eos_token_id = 70
    if form == "folder":
        model = cases.save_model(tmp_path / "model", model, tiny.tokenizer())
    with pytest.raises(CheckpointError, match=r"generation_config.* names token 70 as EOS, .* has only 61"):
        build(run_dir, model, tiny.tokenizer())
    assert not run_dir.parent.exists()
