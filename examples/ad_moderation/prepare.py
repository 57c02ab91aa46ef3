"""Write all inputs of the demo's training stages: data, tokenizer and a random actor. Nothing is downloaded.

    python examples/ad_moderation/prepare.py --out DIR --seed 0

The same seed gives the same bytes in every process on one version of Python. README.md describes the files.
"""

import argparse
import json
import random
import sys
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ad_moderation import ads, docstrings
from ad_moderation.tokenizer import count_tokens, save_tokenizer, train_tokenizer

MAX_POSITIONS = 512
MAX_RESPONSE_TOKENS = 88  # with the end token; max_new_tokens of the training stages
MAX_PROMPT_TOKENS = 110


@dataclass(frozen=True)
class Sizes:
    """Rows of each file. Docstring rows beyond `sft_general` are in `general.jsonl` only."""

    sft_ads: int = 3000
    sft_general: int = 400
    reward_prompts: int = 2500
    prompts_train: int = 2000
    prompts_validation: int = 512
    prompts_test: int = 512


@dataclass(frozen=True)
class ActorShape:
    """The Llama architecture of the random actor: about 3 million parameters."""

    layers: int = 4
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 4
    ffn: int = 688


def build_ads(sizes: Sizes, seed: int) -> dict[str, list[dict]]:
    """Return the ad rows of each file. The prompts of the reward model, of PPO and of SFT are distinct."""
    demonstrations = list(islice(ads.generate(("demonstrations",), seed, "sft"), sizes.sft_ads))
    sft_prompts = {row["prompt"] for row in demonstrations}
    practice = ads.generate(("demonstrations", "practice"), seed, "practice")
    new_rows = (row for row in practice if row["prompt"] not in sft_prompts)
    return {
        "sft": demonstrations,
        "reward_prompts": list(islice(new_rows, sizes.reward_prompts)),
        "prompts_train": list(islice(new_rows, sizes.prompts_train)),
        "prompts_validation": list(islice(ads.generate(("validation",), seed, "validation"), sizes.prompts_validation)),
        "prompts_test": list(islice(ads.generate(("test",), seed, "test"), sizes.prompts_test)),
    }


def build_tokenizer(tables: dict[str, list[dict]], general: list[dict]) -> PreTrainedTokenizerFast:
    """Train the tokenizer on training texts, with ads twice: answers quote ads, so their words should be short."""
    training = tables["sft"] * 2 + tables["prompts_train"] + general
    return train_tokenizer((row[key] for row in training for key in ("prompt", "response")), MAX_POSITIONS)


def fitting(tokenizer: PreTrainedTokenizerFast, rows: list[dict]) -> list[dict]:
    """Return the rows whose prompt and response fit their token limits, the chat markers included."""
    prompt_counts = count_tokens(tokenizer, [row["prompt"] for row in rows])
    response_counts = count_tokens(tokenizer, [row["response"] for row in rows])
    counted = zip(rows, prompt_counts, response_counts, strict=True)
    return [row for row, p, r in counted if p + 2 <= MAX_PROMPT_TOKENS and r + 1 <= MAX_RESPONSE_TOKENS]


def random_actor(tokenizer: PreTrainedTokenizerFast, seed: int, shape: ActorShape | None = None) -> LlamaForCausalLM:
    """Return a Llama actor in fp32 with random weights that depend on the seed alone, changed by `plant_copying`."""
    shape = shape or ActorShape()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.02,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        actor = LlamaForCausalLM(config)
        plant_copying(actor)
    return actor


@torch.no_grad()
def plant_copying(actor: LlamaForCausalLM) -> None:
    """Add the beginnings of an induction circuit (Olsson et al. 2022) to random weights, in place.

    A quote is a copy. From random weights, the two heads of a copying circuit need far more steps to form than a minute
    of training has. The first key-value head of layer 0 attends to the previous token and writes it as a note. The
    first key-value heads of layers 1 and 2 attend to positions whose note is the current token, and write the token at
    that position. All other weights stay random, and all weights are trained.
    """
    # 1. Directions of the residual stream: one that all tokens share, and random ones for token, note and copies.
    config = actor.config
    hidden, size = config.hidden_size, config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads // config.num_key_value_heads
    half = size // 2
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    # Queries and keys have no bias: attention to a relative position reads the constant direction instead.
    shared = torch.nn.functional.normalize(torch.randn(hidden), dim=0)
    embedding = actor.model.embed_tokens.weight
    embedding.copy_(embedding / (config.initializer_range * hidden**0.5) + shared)
    for layer in actor.model.layers:
        for reader in (layer.self_attn.v_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
            reader.weight -= torch.outer(reader.weight @ shared, shared)
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight /= (2 * config.num_hidden_layers) ** 0.5
    basis = torch.linalg.qr(torch.cat([shared[:, None], torch.randn(hidden, 6 * size)], dim=1)).Q.T[1:]
    token, note, *copies = basis.split(size)

    # 2. Layer 0: attend to the previous token, write it as the note.
    previous = actor.model.layers[0].self_attn
    query, key = torch.zeros(size), torch.zeros(size)
    fast = slice(0, 4)  # the fastest RoPE rotations distinguish adjacent positions
    query[fast] = 0.5
    key[:half][fast], key[half:][fast] = 0.5 * frequency[fast].cos(), 0.5 * frequency[fast].sin()
    previous.q_proj.weight[: queries * size] += torch.outer(query, shared).repeat(queries, 1)
    previous.k_proj.weight[:size] += torch.outer(key, shared)
    previous.v_proj.weight[:size] += 0.45 * token
    previous.o_proj.weight[:, :size] += 0.45 * note.T

    # 3. Layers 1 and 2: attend to positions whose note is the current token, copy the token there.
    slow = [*range(half // 2, half), *range(half + half // 2, size)]  # rotations that hardly change over a prompt
    for index, values in enumerate(copies):
        match, group = actor.model.layers[1 + index // 2].self_attn, index % 2
        half_note = slice(group * half, (group + 1) * half)  # each group compares one half of the note
        rows = slice(group * size, (group + 1) * size)
        match.k_proj.weight[rows][slow] += 3 * note[half_note]
        match.v_proj.weight[rows] += values
        for head in range(group * queries, (group + 1) * queries):
            rows = slice(head * size, (head + 1) * size)
            match.q_proj.weight[rows][slow] += 3 * token[half_note]
            match.o_proj.weight[:, rows] += values.T


def prepare(out_dir: str | Path, seed: int = 0, sizes: Sizes | None = None) -> dict:
    """Write all files into `out_dir` and return the manifest."""
    # 1. rows and tokenizer
    sizes, out = sizes or Sizes(), Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    tables = build_ads(sizes, seed)
    general = {part: docstrings.rows(part) for part in ("train", "validation", "test")}
    tokenizer = build_tokenizer(tables, general["train"])
    general = {part: fitting(tokenizer, rows) for part, rows in general.items()}
    rng = random.Random(f"{seed}/blend")
    blend = tables["sft"] + rng.sample(general["train"], min(sizes.sft_general, len(general["train"])))
    rng.shuffle(blend)
    files = {
        "sft": blend,
        "general": general["train"],
        "general_validation": general["validation"],
        "general_test": general["test"],
        **{name: rows for name, rows in tables.items() if name != "sft"},
    }
    # 2. files
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
    save_tokenizer(tokenizer, out / "tokenizer")
    actor = random_actor(tokenizer, seed)
    logging.disable_progress_bar()
    actor.save_pretrained(str(out / "actor_init"))
    save_tokenizer(tokenizer, out / "actor_init")
    # 3. manifest
    manifest = {
        "seed": seed,
        "python": sys.version.split()[0],
        "sizes": asdict(sizes),
        "rows": {name: len(rows) for name, rows in files.items()},
        "tokens": {name: token_lengths(tokenizer, rows) for name, rows in files.items()},
        "max_prompt_tokens": MAX_PROMPT_TOKENS,
        "max_response_tokens": MAX_RESPONSE_TOKENS,
        "vocab_size": len(tokenizer),
        "actor_parameters": sum(p.numel() for p in actor.parameters()),
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def token_lengths(tokenizer: PreTrainedTokenizerFast, rows: list[dict]) -> dict[str, float]:
    """Return mean and longest prompt and response in tokens, with 2 and 1 markers of the chat template."""
    lengths = {}
    for key, markers in (("prompt", 2), ("response", 1)):
        counts = [count + markers for count in count_tokens(tokenizer, [row[key] for row in rows])]
        lengths[f"{key}_mean"] = round(sum(counts) / len(counts), 1) if counts else 0.0
        lengths[f"{key}_max"] = max(counts, default=0)
    return lengths


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(json.dumps(prepare(arguments.out, arguments.seed), indent=2))


if __name__ == "__main__":
    main()
