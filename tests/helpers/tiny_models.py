"""Tiny models, a tiny tokenizer and small experience, made on the spot and the same every time."""

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
    """One token per character, a pad token that is not EOS, and a chat template."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789 .,!?'-"
    vocab = {token: index for index, token in enumerate((*SPECIAL, "<unk>", *characters))}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([*SPECIAL, "<unk>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", chat_template=TEMPLATE
    )


def model_config(family: str = "llama", **changes) -> PreTrainedConfig:
    """Two layers of width 32, grouped-query attention, an odd vocabulary."""
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


def _made(kind, seed: int, family: str, **changes):
    torch.manual_seed(seed)
    model = kind.from_config(model_config(family, **changes)).eval()
    with torch.no_grad():  # norms of one and biases of zero would hide that they are read from the wrong place
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def causal_lm(seed: int = 0, family: str = "llama", **changes) -> PreTrainedModel:
    """A random language model in fp32."""
    return _made(AutoModelForCausalLM, seed, family, **changes)


def scorer(seed: int = 1, family: str = "llama", **changes) -> PreTrainedModel:
    """A random model with a scalar head in fp32."""
    return _made(AutoModelForSequenceClassification, seed, family, num_labels=1, **changes)


def nudged(model, scale: float, seed: int = 7):
    """A copy with noise on every parameter."""
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
    """A role with the weights of a `transformers` model; it learns if it is given an optimizer."""
    model = build_model(source, head, current_cluster(), dtype=dtype, **kwargs)
    return Role("role", model) if learns is None else TrainableRole("role", model, learns, 10)


def reload(role: Role, source) -> None:
    """Give a role other weights in place."""
    loader.load(role.model, HFCheckpointReader(source))


def by_hugging_face_name(role: Role, read) -> dict[str, torch.Tensor]:
    """What `read` finds on each parameter, copied, under the names of Hugging Face."""
    return {name: x.clone() for name, x in exporter.export_tensors(role.model, torch.float32, read)}


def gradients(role: TrainableRole, work) -> dict[str, torch.Tensor]:
    """The gradients of one accumulation under their Hugging Face names, divided by the counted tokens."""
    role.zero_gradients()
    role.accumulate(work)
    return by_hugging_face_name(role, lambda p: p.main_grad)


def gap(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Distance of two sets of tensors over the norm of the second: all together, and of the worst tensor."""
    assert ours.keys() == theirs.keys()
    norms = {n: theirs[n].double().norm().item() for n in theirs}
    away = {n: (ours[n].double() - theirs[n].double()).norm().item() for n in theirs}
    total = sum(x * x for x in norms.values()) ** 0.5
    distance = sum(x * x for x in away.values()) ** 0.5
    assert total > 0
    return distance / total, max(away[n] / norms[n] for n in theirs if norms[n] > 1e-4 * total)


def parameters(role: Role) -> dict[str, torch.Tensor]:
    """Copies of a role's weights."""
    return {name: p.detach().clone() for name, p in role.model.named_parameters()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors agree to the bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def responses(count: int = 9, seed: int = 3, longest: int = 9) -> list[Response]:
    """Made-up answers of many lengths: a third truncated, the others closed by EOS; one is a lone EOS."""
    draw = random.Random(seed)
    made = []
    for n in range(count):
        prompt = [draw.randrange(2, VOCAB) for _ in range(draw.randint(1, 8))]
        truncated = n % 3 == 2
        body = [draw.randrange(2, VOCAB) for _ in range(0 if n == 1 else draw.randint(1, longest))]
        tokens = body if truncated else [*body, EOS]
        reason = "length" if truncated else "stop"
        made.append(Response(n, 0, n, prompt, tokens, [-1.0] * len(tokens), reason))
    return made


def count_letters(samples) -> list[float]:
    """A reward function: the share of vowels."""
    return [sum(c in "aeiou" for c in s.text) / max(len(s.text), 1) for s in samples]


def ppo_config(folder, *, temperature: float = 1.0, max_new_tokens: int = 8, **changes) -> PPOConfig:
    """A PPO run of a few small iterations."""
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
    """A model's weights as float64 leaves that ask for gradients."""
    return {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}


def llama64(weights: dict[str, torch.Tensor], config: PreTrainedConfig, ids: list[int]) -> torch.Tensor:
    """The hidden states [L, H] of one sequence in float64 throughout (transformers' own norms compute in fp32)."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    dim = config.head_dim
    length = len(ids)
    position = torch.arange(length, dtype=torch.float64)
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = position[:, None] * frequency
    ahead = torch.ones(length, length, dtype=torch.bool).triu(1)

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
            mixed.append(score.masked_fill(ahead, -torch.inf).softmax(-1) @ v[:, shared])
        x = x + torch.cat(mixed, dim=-1) @ weights[f"{at}.self_attn.o_proj.weight"].t()
        h = norm(x, f"{at}.post_attention_layernorm.weight")
        gate, up = (h @ weights[f"{at}.mlp.{part}_proj.weight"].t() for part in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ weights[f"{at}.mlp.down_proj.weight"].t()
    return norm(x, "model.norm.weight")
