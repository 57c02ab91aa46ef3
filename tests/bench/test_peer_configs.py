"""The configurations for other libraries have the workload's sizes and the recipe, and the files are the workload."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from bench.end_to_end.recipe import ppo_config
from bench.end_to_end.workloads import RECIPE, WORKLOADS, workload_of
from bench.peers.workload_files import flags, write
from icegrt import PPOConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "bench" / "peers" / "configs"
W = WORKLOADS["135M"]


def lookup(tree, path):
    for key in path.split("."):
        tree = tree[key]
    return tree


def expected(config):
    """The figures by our name."""
    return {
        "prompts": W.prompts,
        "samples": W.samples,
        "answer tokens": W.answer_tokens,
        "context": W.context,
        "episodes": W.episodes,
        "prompt tokens": W.prompt_tokens[1],
        "betas": [config.optimizer.beta1, config.optimizer.beta2],
        "weight decay": config.optimizer.weight_decay,
        "clip grad": config.optimizer.clip_grad,
        "once": 1,
        **RECIPE,
    }


def optimizer_keys(roles, lr, betas, weight_decay, clip_grad):
    """The keys of each role's optimizer, and the figures that they have."""
    keys = {lr: "lr", betas: "betas", weight_decay: "weight decay", clip_grad: "clip grad"}
    return {f"{role}.{key}": figure for role in roles for key, figure in keys.items()}


KEYS = {
    "verl": {
        "data.train_batch_size": "prompts",
        "actor_rollout_ref.actor.ppo_mini_batch_size": "prompts",
        "actor_rollout_ref.rollout.n": "samples",
        "data.max_prompt_length": "prompt tokens",
        "data.max_response_length": "answer tokens",
        "actor_rollout_ref.actor.ppo_epochs": "once",
        "critic.ppo_epochs": "once",
        "actor_rollout_ref.rollout.temperature": "once",
        "algorithm.kl_ctrl.kl_coef": "kl_coef",
        "algorithm.gamma": "gamma",
        "algorithm.lam": "lam",
        "actor_rollout_ref.actor.clip_ratio": "clip",
        "actor_rollout_ref.actor.clip_ratio_low": "clip",
        "actor_rollout_ref.actor.clip_ratio_high": "clip",
        "critic.cliprange_value": "value_clip",
        **optimizer_keys(
            ("actor_rollout_ref.actor", "critic"), "optim.lr", "optim.betas", "optim.weight_decay", "grad_clip"
        ),
    },
    "nemo_rl": {
        "ppo.num_prompts_per_step": "prompts",
        "ppo.num_generations_per_prompt": "samples",
        "policy.train_global_batch_size": "episodes",
        "policy.max_total_sequence_length": "context",
        "env.reward_model.max_model_len": "context",
        "data.max_input_seq_length": "prompt tokens",
        "policy.generation.max_new_tokens": "answer tokens",
        "policy.generation.temperature": "once",
        "ppo.ppo_epochs": "once",
        "loss_fn.reference_policy_kl_penalty": "kl_coef",
        "ppo.adv_estimator.gae_gamma": "gamma",
        "ppo.adv_estimator.gae_lambda": "lam",
        "loss_fn.ratio_clip_min": "clip",
        "loss_fn.ratio_clip_max": "clip",
        "value_loss_fn.cliprange": "value_clip",
        **optimizer_keys(
            ("policy", "value"),
            "optimizer.kwargs.lr",
            "optimizer.kwargs.betas",
            "optimizer.kwargs.weight_decay",
            "max_grad_norm",
        ),
    },
}
FLAGS = {
    "rollout.batch_size": "prompts",
    "rollout.n_samples_per_prompt": "samples",
    "train.batch_size": "episodes",
    "data.max_len": "context",
    "rollout.max_new_tokens": "answer tokens",
    "rollout.temperature": "once",
    "train.max_epochs": "once",
    "algo.kl.init_coef": "kl_coef",
    "algo.advantage.gamma": "gamma",
    "algo.advantage.lambd": "lam",
    "actor.eps_clip": "clip",
    "critic.value_clip": "value_clip",
    **optimizer_keys(("actor", "critic"), "adam.lr", "adam.betas", "adam.weight_decay", "max_norm"),
}


@pytest.mark.parametrize("library", KEYS)
def test_a_configuration_has_the_figures_of_workload_and_recipe(library):
    tree = yaml.safe_load((CONFIGS / f"{library}.yaml").read_text())
    figures = expected(ppo_config(W, "unused"))
    assert {key: lookup(tree, key) for key in KEYS[library]} == {k: figures[v] for k, v in KEYS[library].items()}


def test_the_flags_have_the_figures_of_workload_and_recipe():
    tree = yaml.safe_load((CONFIGS / "openrlhf.yaml").read_text())
    figures = expected(ppo_config(W, "unused"))
    assert {key: tree[key] for key in FLAGS} == {key: figures[value] for key, value in FLAGS.items()}


def test_flags_are_arguments(monkeypatch):
    monkeypatch.setenv("WORKLOAD", "/data/w")
    arguments = flags(CONFIGS / "openrlhf.yaml")
    at = arguments.index("--actor.model_name_or_path")
    assert arguments[at + 1] == "/data/w/actor"
    at = arguments.index("--ds.packing_samples")
    assert arguments[at + 1].startswith("--")
    at = arguments.index("--actor.adam.betas")
    assert arguments[at + 1 : at + 3] == ["0.9", "0.95"]
    assert not [a for a in arguments if "$" in a or a == "True"]


def test_the_readme_configures_icegrt_with_the_recipe(tmp_path):
    text = (CONFIGS / "README.md").read_text()
    block = text.split("```yaml")[1].split("```")[0]
    (tmp_path / "icegrt.yaml").write_text("\n".join(line[3:] for line in block.splitlines()))
    ours, config = PPOConfig.load(tmp_path / "icegrt.yaml", []), ppo_config(W, "runs/workload", "bf16")
    changed = {"iterations": 8, "checkpoint_every": ours.checkpoint_every, "sampling": ours.sampling}
    for name, value in vars(config).items():
        assert getattr(ours, name) == changed.get(name, value), name
    assert ours.sampling.max_new_tokens == config.sampling.max_new_tokens


def test_the_files_are_the_workload(tmp_path):
    small = workload_of("135M,layers=2,width=36,mlp=40,vocab=64,prompts=3,prompt_tokens=2:5")
    write(small, tmp_path)
    shape = AutoConfig.from_pretrained(tmp_path / "actor")
    assert (shape.num_hidden_layers, shape.hidden_size, shape.vocab_size) == (2, 36, 64)
    assert shape.tie_word_embeddings and shape.num_key_value_heads == small.kv_heads
    actor = AutoModelForCausalLM.from_pretrained(tmp_path / "actor")
    assert actor.model.embed_tokens.weight.equal(small.actor().model.embed_tokens.weight)
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert reward.score.weight.equal(small.reward_model().score.weight)
    # Both forms of the prompts have the workload's tokens, and so has their text when it is read again.
    tokens = AutoTokenizer.from_pretrained(tmp_path / "reward")
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [tokens(row["prompt"])["input_ids"] for row in rows] == small.prompt_ids()
    chats = pyarrow.parquet.read_table(tmp_path / "prompts.parquet").to_pylist()
    for chat, ids in zip(chats, small.prompt_ids(), strict=True):
        text = tokens.apply_chat_template(chat["prompt"], tokenize=False)
        assert tokens(text)["input_ids"] == ids
        assert tokens(tokens.decode(ids))["input_ids"] == ids
