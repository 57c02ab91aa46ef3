"""Tiny deterministic models, tokenizer, responses and configurations, and comparisons of tensors by name."""

from __future__ import annotations

import copy
import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from icegrt.config import CriticConfig, OptimizerConfig, PPOConfig, RunConfig, SamplingConfig
from icegrt.distributed.cluster import Cluster
from icegrt.model.build import build_model
from icegrt.model.hf import exporter, loader
from icegrt.model.hf.reader import HFCheckpointReader
from icegrt.roles.role import Role, TrainableRole
from icegrt.rollout.types import Response

SPECIAL = ("<pad>", "<eos>", "<user>", "<assistant>")
PAD, EOS = 0, 1
VOCAB = 61
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = ("ad", "sale", "free", "buy now", "red cat", "no", "yes it is", "win 99", "a", "the end")
PROMPTS = [{"prompt": word} for word in WORDS]


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character, VOCAB in all, a pad token and a chat template."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789 .,!?'-" + "ABCDEFGHIJKLM"
    vocab = {token: index for index, token in enumerate((*SPECIAL, "<unk>", *characters))}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([*SPECIAL, "<unk>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", chat_template=TEMPLATE
    )


def model_config(family: str = "llama", **changes) -> PreTrainedConfig:
    """Return a configuration of two layers of width 32, grouped-query attention and an odd vocabulary."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.25,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": None,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    return AutoConfig.for_model(family, **(settings | changes))


def random_model(kind, seed: int, family: str, **changes):
    """Return a random fp32 model of a transformers Auto class."""
    torch.manual_seed(seed)
    model = kind.from_config(model_config(family, **changes)).eval()
    with torch.no_grad():  # norms of one and biases of zero would hide that they are read from the wrong tensor
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def causal_lm(seed: int = 0, family: str = "llama", **changes) -> PreTrainedModel:
    """Return a random language model in fp32."""
    return random_model(AutoModelForCausalLM, seed, family, **changes)


def scorer(seed: int = 1, family: str = "llama", **changes) -> PreTrainedModel:
    """Return a random model with a scalar head in fp32."""
    return random_model(AutoModelForSequenceClassification, seed, family, **({"num_labels": 1} | changes))


def nudged(model, scale: float, seed: int = 7):
    """Return a copy with noise added to every parameter."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def current_cluster() -> Cluster:
    """The cluster that the test has open."""
    with Cluster.open() as cluster:
        return cluster


def role(source, head: str = "lm", *, learns: OptimizerConfig | None = None, dtype=torch.float32, **kwargs) -> Role:
    """Return a role with the weights of a transformers model. learns: the optimizer of a trainable role."""
    model = build_model(source, head, current_cluster(), dtype=dtype, **kwargs)
    return Role("role", model) if learns is None else TrainableRole("role", model, learns, 10)


def reload(role: Role, source) -> None:
    """Replace the weights of a role in place."""
    loader.load(role.model, HFCheckpointReader(source))


def by_hugging_face_name(role: Role, read) -> dict[str, torch.Tensor]:
    """Return copies of `read(parameter)` under Hugging Face names."""
    return {name: x.clone() for name, x in exporter.export_tensors(role.model, torch.float32, read)}


def gradients(role: TrainableRole, work) -> dict[str, torch.Tensor]:
    """Return the gradients of one accumulation under Hugging Face names, divided by the counted tokens."""
    role.zero_gradients()
    role.accumulate(work)
    return by_hugging_face_name(role, lambda p: p.main_grad)


def gap(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Return the relative distance to `expected`: of all tensors as one vector, and of the worst single tensor."""
    assert tensors.keys() == expected.keys()
    norms = {n: expected[n].double().norm().item() for n in expected}
    distances = {n: (tensors[n].double() - expected[n].double()).norm().item() for n in expected}
    total = sum(x * x for x in norms.values()) ** 0.5
    distance = sum(x * x for x in distances.values()) ** 0.5
    assert total > 0
    return distance / total, max(distances[n] / norms[n] for n in expected if norms[n] > 1e-4 * total)


def parameters(role: Role) -> dict[str, torch.Tensor]:
    """Return copies of the weights of a role."""
    return {name: p.detach().clone() for name, p in role.model.named_parameters()}


def same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Return whether two sets of tensors have equal names and bits."""
    return tensors.keys() == expected.keys() and all(torch.equal(tensors[n], expected[n]) for n in tensors)


def responses(count: int = 9, seed: int = 3, longest: int = 9) -> list[Response]:
    """Return random responses of many lengths: a third truncated, the others ended by EOS; one is EOS alone."""
    draw = random.Random(seed)
    generated = []
    for n in range(count):
        prompt = [draw.randrange(2, VOCAB) for _ in range(draw.randint(1, 8))]
        truncated = n % 3 == 2
        body = [draw.randrange(2, VOCAB) for _ in range(0 if n == 1 else draw.randint(1, longest))]
        tokens = body if truncated else [*body, EOS]
        reason = "length" if truncated else "stop"
        generated.append(Response(n, 0, n, prompt, tokens, [-1.0] * len(tokens), reason))
    return generated


def count_letters(samples) -> list[float]:
    """Return the share of vowels of each sample: a reward function."""
    return [sum(c in "aeiou" for c in s.text) / max(len(s.text), 1) for s in samples]


def ppo_config(folder, *, temperature: float = 1.0, max_new_tokens: int = 8, **changes) -> PPOConfig:
    """Return the configuration of a PPO run of three small iterations."""
    run = {"dir": str(folder), "seed": 5} | changes.pop("run", {})
    settings = {
        "iterations": 3,
        "prompts_per_iteration": 4,
        "samples_per_prompt": 2,
        "ppo_epochs": 2,
        "minibatches": 2,
        "token_budget": 48,
        "eval_every": 0,
        "sampling": SamplingConfig(temperature=temperature, max_new_tokens=max_new_tokens),
        "optimizer": OptimizerConfig(lr=1e-2),
        "critic": CriticConfig(optimizer=OptimizerConfig(lr=1e-2)),
        "run": RunConfig(**run),
    }
    return PPOConfig(**(settings | changes))


def doubles(model) -> dict[str, torch.Tensor]:
    """Return the weights of a model as float64 leaves that require gradients."""
    return {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}


def llama64(weights: dict[str, torch.Tensor], config: PreTrainedConfig, ids: list[int]) -> torch.Tensor:
    """Return the hidden states [L, H] of one sequence, in float64 throughout (transformers computes norms in fp32)."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    dim = config.head_dim
    length = len(ids)
    position = torch.arange(length, dtype=torch.float64)
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = position[:, None] * frequency
    future = torch.ones(length, length, dtype=torch.bool).triu(1)

    def norm(x, name):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + config.rms_norm_eps) * weights[name]

    def turn(x):
        a, b = x[:, : dim // 2], x[:, dim // 2 :]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        h = norm(x, f"{at}.input_layernorm.weight")
        q, k, v = (h @ weights[f"{at}.self_attn.{part}_proj.weight"].t() for part in "qkv")
        mixed = []
        for head in range(heads):
            group = head // (heads // groups)
            own, shared = slice(head * dim, (head + 1) * dim), slice(group * dim, (group + 1) * dim)
            score = turn(q[:, own]) @ turn(k[:, shared]).t() / dim**0.5
            mixed.append(score.masked_fill(future, -torch.inf).softmax(-1) @ v[:, shared])
        x = x + torch.cat(mixed, dim=-1) @ weights[f"{at}.self_attn.o_proj.weight"].t()
        h = norm(x, f"{at}.post_attention_layernorm.weight")
        gate, up = (h @ weights[f"{at}.mlp.{part}_proj.weight"].t() for part in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ weights[f"{at}.mlp.down_proj.weight"].t()
    return norm(x, "model.norm.weight")
