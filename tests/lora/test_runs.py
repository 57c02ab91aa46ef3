"""Runs with adapters: SFT, reward model and PPO one after another, their exports, and what is refused."""

import json
import math

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from icegrt.checkpoint.directory import list_checkpoints, read_state
from icegrt.commands import export
from icegrt.config import ExportConfig, PPOConfig, RewardConfig, SFTConfig
from icegrt.errors import CheckpointError, ConfigError
from icegrt.model.architecture import Architecture
from icegrt.model.hf.mapping import parameter_mapping
from icegrt.model.lora.peft_format import AdapterReader
from icegrt.model.lora.spec import AdapterSpec, adapter_mapping
from icegrt.ppo.trainer import PPOTrainer
from icegrt.training.reward_model import RewardTrainer
from icegrt.training.sft import SFTTrainer
from tests.helpers import tiny_models as tiny
from tests.helpers.stage_cases import SMALL_PPO

LORA = ("sharing=lora", "lora.rank=4", "optimizer.lr=1e-2")


def keys(stage, folder, *more):
    return [f"{stage}.{key}" for key in (*LORA, f"run.dir={folder}", *more)]


def sft_config(home, folder, *more):
    data = f"data=[{{path: {home.sft}}}]"
    small = ("epochs=2", "batch_sequences=4", "token_budget=128", f"model={home.actor}")
    return SFTConfig.load(None, keys("sft", folder, data, *small, *more))


def reward_config(home, model, folder, *more):
    data = f"data=[{{path: {home.rankings}}}]"
    small = ("batch_prompts=4", "token_budget=256", "heldout_fraction=0.25", f"model={model}")
    return RewardConfig.load(None, keys("reward", folder, data, *small, *more))


def ppo_config(home, actor, reward, folder, *more):
    inputs = (f"actor={actor}", f"prompts={home.prompts}", *([f"reward_model={reward}"] if reward else []))
    return PPOConfig.load(None, [*SMALL_PPO, *keys("ppo", folder, *inputs, *more)])


@pytest.fixture(scope="module")
def recipe(home, tmp_path_factory):
    """The folder of an SFT run and of a reward run on its merged model."""
    folder = tmp_path_factory.mktemp("recipe")
    with SFTTrainer(sft_config(home, folder / "sft")) as run:
        run.train()
    with RewardTrainer(reward_config(home, folder / "sft" / "model", folder / "reward")) as run:
        run.train()
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([[5, 6, 7, 8]])).logits


def gap(one, other):
    return float((logits(one) - logits(other)).abs().max() / logits(other).abs().max())


def test_a_run_writes_its_model_merged_and_its_adapter_alone(home, recipe):
    for stage, kind, base in (
        ("sft", AutoModelForCausalLM, home.actor),
        ("reward", AutoModelForSequenceClassification, recipe / "sft" / "model"),
    ):
        options = {} if stage == "sft" else {"num_labels": 1, "pad_token_id": tiny.PAD}
        start = kind.from_pretrained(base, **options)
        merged = kind.from_pretrained(recipe / stage / "model")
        assert gap(merged, start) > 0.1, "nothing was learned"
        assert gap(PeftModel.from_pretrained(start, recipe / stage / "adapter"), merged) < 1e-5
    assert (recipe / "reward" / "adapter" / "score_statistics.json").is_file()


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_export_merges_an_adapter_or_writes_it_alone(stage, home, recipe, tmp_path):
    run = f"export.run={recipe / stage}"
    role = "export.role=model"
    export.run(ExportConfig.load(None, [run, role, f"export.out={tmp_path / 'model'}"]))
    export.run(ExportConfig.load(None, [run, role, f"export.out={tmp_path / 'adapter'}", "export.adapter=true"]))
    for name, file in (("model", "model.safetensors"), ("adapter", "adapter_model.safetensors")):
        expected = (recipe / stage / name / file).read_bytes()
        assert (tmp_path / name / file).read_bytes() == expected, name
    assert AdapterReader(tmp_path / "adapter").trunk_hash == AdapterReader(recipe / stage / "adapter").trunk_hash
    with pytest.raises(CheckpointError, match="an adapter of other weights"):
        export.run(ExportConfig.load(None, [run, role, f"export.out={tmp_path / 'x'}", f"export.base={home.reward}"]))


def test_at_rest_the_policy_is_the_reference_and_the_reward_costs_no_model(home, recipe, tmp_path):
    actor, reward = recipe / "sft" / "model", recipe / "reward" / "adapter"
    still = ("optimizer.lr=0", "critic.optimizer.lr=0", "ppo_epochs=2")
    with PPOTrainer(ppo_config(home, actor, reward, tmp_path / "rest", *still)) as run:
        step = run.step()
        roles = run.components.roles
        parameters = {id(p): p.nbytes for role in roles.values() for p in role.model.parameters()}
        model = sum(p.nbytes for p in run.components.reference.model.parameters())
    assert (step.ratio_min, step.ratio_max) == (1.0, 1.0)
    assert step.kl_nats_per_response == 0.0 and step.grad_norm_actor > 0
    assert roles.keys() == {"actor", "reference", "reward", "critic"}
    # The adapters of a tiny model are large beside it: what is counted is that no role has a model of its own.
    own = [sum(p.nbytes for p in roles[name].model.parameters()) for name in ("actor", "reward", "critic")]
    assert sum(parameters.values()) == model + sum(own)


def test_ppo_trains_and_resumes_and_exports(home, recipe, tmp_path):
    actor, reward = recipe / "sft" / "model", recipe / "reward" / "adapter"
    config = ppo_config(home, actor, reward, tmp_path / "ppo", "checkpoint_every=1")
    with PPOTrainer(config) as run:
        run.train()
    saved = read_state(list_checkpoints(tmp_path / "ppo")[-1])["roles"]
    assert {saved[role]["adapter"]["trunk"] for role in ("actor", "critic")} == {str(actor)}
    base = AutoModelForCausalLM.from_pretrained(actor)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo" / "model")
    assert gap(merged, base) > 1e-3
    assert gap(PeftModel.from_pretrained(base, tmp_path / "ppo" / "adapter"), merged) < 1e-5
    # The critic started from the reward model's adapter and head.
    export.run(
        ExportConfig.load(
            None, [f"export.run={tmp_path / 'ppo'}", "export.role=critic", f"export.out={tmp_path / 'critic'}"]
        )
    )
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
    # Resumed with other adapters, with none, or on other weights: refused.
    for changes, message in (
        (["ppo.lora.rank=5"], "ppo.lora: the actor's rank is 5, in .* it is 4; set it to that"),
        (
            ["ppo.sharing=full", f"ppo.reward_model={recipe / 'reward' / 'model'}"],
            "ppo.sharing is full, but .* was made with lora",
        ),
    ):
        again = PPOConfig.load(None, [*SMALL_PPO, *_overrides(config), *changes, "ppo.run.resume=true"])
        with pytest.raises(ConfigError, match=message):
            PPOTrainer(again)
    with safe_open(actor / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    content = (actor / "model.safetensors").read_bytes()
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * 2}, actor / "model.safetensors")
    try:
        for scorer, where in ((reward, "adapter"), (home.reward, r"step_000002 \(actor\)")):
            changes = [f"ppo.reward_model={scorer}", "ppo.run.resume=true", "ppo.critic.init=actor"]
            again = PPOConfig.load(None, [*SMALL_PPO, *_overrides(config), *changes])
            with pytest.raises(CheckpointError, match=rf"{where}: an adapter of other weights"):
                PPOTrainer(again)
    finally:
        (actor / "model.safetensors").write_bytes(content)


def _overrides(config):
    return [
        f"ppo.actor={config.actor}",
        f"ppo.reward_model={config.reward_model}",
        f"ppo.prompts={config.prompts}",
        f"ppo.run.dir={config.run.dir}",
        "ppo.sharing=lora",
        "ppo.lora.rank=4",
    ]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (["lora.rank=0"], ConfigError, "lora.rank"),
        (["lora.target_modules=[q_proj, wq]"], ConfigError, "ppo.lora.target_modules: `wq` is no projection"),
        (["lora.target_modules=[]"], ConfigError, "ppo.lora.target_modules: the list is empty"),
        (["reference={home.reward}"], ConfigError, "with ppo.sharing=lora the reference is the actor's checkpoint"),
        (["reward_model={home.reward}"], ConfigError, "the critic cannot start from .* Set ppo.critic.init=actor"),
        (["sharing=full"], ConfigError, "is an adapter, and ppo.sharing is full"),
        (["actor={home.actor}"], CheckpointError, "an adapter of other weights .*those of .*actor"),
        (["actor={recipe}/sft/adapter"], CheckpointError, "an adapter, not a model. Name the merged model"),
        (["reward_model={recipe}/sft/adapter"], ConfigError, "an adapter without a `score` head"),
    ],
)
def test_what_cannot_be_on_one_trunk_is_refused(changes, error, message, home, recipe, tmp_path):
    changes = [change.format(home=home, recipe=recipe) for change in changes]
    with pytest.raises(error, match=message):
        PPOTrainer(
            ppo_config(home, recipe / "sft" / "model", recipe / "reward" / "adapter", tmp_path / "run", *changes)
        )
    assert not (tmp_path / "run").exists()


def test_a_reward_model_of_its_own_beside_the_adapters(home, recipe, tmp_path):
    changes = ("critic.init=actor",)
    with PPOTrainer(ppo_config(home, recipe / "sft" / "model", home.reward, tmp_path / "run", *changes)) as run:
        run.step()
        reward = run.components.roles["reward"].model
        assert sum(p.numel() for p in reward.parameters()) > 10_000 and reward.adapter is None


def test_sft_resumes_to_the_bit(home, tmp_path):
    with SFTTrainer(sft_config(home, tmp_path / "whole")) as run:
        run.train()
        expected = tiny.parameters(run.role)
    with SFTTrainer(sft_config(home, tmp_path / "half")) as run:
        run.step()
        run.save_checkpoint()
        run.complete_checkpoint()
    with SFTTrainer(sft_config(home, tmp_path / "half", "run.resume=true")) as run:
        assert run.done_steps == 1
        run.train()
        assert tiny.same(tiny.parameters(run.role), expected)
    config = json.loads((tmp_path / "half" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == home.actor and config["task_type"] == "CAUSAL_LM"


def test_sft_with_an_unknown_target_is_refused_before_data_is_read(home, tmp_path):
    with pytest.raises(ConfigError, match=r"sft\.lora\.target_modules: `c_attn` is no projection"):
        SFTTrainer(sft_config(home, tmp_path / "run", "lora.target_modules=[c_attn]", "data=[{path: nowhere}]"))


@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size", "heads", "kv_heads", "layers", "vocab_size"),
    [(896, 4864, 14, 2, 24, 151936), (4096, 14336, 32, 8, 32, 128256)],
    ids=["Qwen2.5-0.5B", "Llama-3.1-8B"],
)
def test_adapters_of_three_roles_are_at_most_a_tenth_of_a_model(
    hidden_size, intermediate_size, heads, kv_heads, layers, vocab_size
):
    config = tiny.model_config(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=layers,
        vocab_size=vocab_size,
        tie_word_embeddings=True,
    )
    architecture = Architecture.from_config(config.to_dict())

    def count(specs):
        return sum(math.prod(shape) for spec in specs for shape in spec.shapes)

    model = count(parameter_mapping(architecture, "lm"))
    adapter = count(adapter_mapping(architecture, AdapterSpec.of(PPOConfig().lora, "lora"), "scalar"))
    assert 0 < 3 * adapter <= 0.1 * model
