"""Six digits to sort: rows in parts without overlap, a tokenizer of one token per character, a small random Llama.

The sorted digits decide the part of a row. So no answer of a held-out part occurs in training, in any order of digits.
"""

import json
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from icegrt.utils.files import write_text_atomic

__all__ = ["DIGITS", "SIZES", "build_model", "build_rows", "build_tokenizer", "part_of", "prepare"]

DIGITS = 6
# Labelled rows are few, prompts are many.
SIZES = {"sft": 80, "prompts": 16_000, "validation": 256, "test": 512}
_SHARES = (("sft", 20), ("prompts", 80), ("validation", 90), ("test", 100))
PAD, END, UNKNOWN, ASK = "<pad>", "<end>", "<unknown>", "="
VOCABULARY = (PAD, END, UNKNOWN, ASK, *"0123456789")


def part_of(answer: str) -> str:
    """Return the part of a row by a checksum of its answer: 20% sft, 60% prompts, 10% validation, 10% test."""
    place = zlib.crc32(answer.encode()) % 100
    return next(part for part, end in _SHARES if place < end)


def draw_rows(seed: int) -> Iterator[dict[str, str]]:
    """Yield rows of six random digits: `prompt`, and `response` with the digits in order. Prompts are distinct."""
    generator = random.Random(seed)
    seen: set[str] = set()
    while True:
        digits = f"{generator.randrange(10**DIGITS):0{DIGITS}d}"
        if digits not in seen:
            seen.add(digits)
            yield {"prompt": digits + ASK, "response": "".join(sorted(digits))}


def build_rows(sizes: dict[str, int], seed: int) -> dict[str, list[dict[str, str]]]:
    """Return the rows of each part. Rows of `prompts` have no response: their column `answer` is for the reward alone.

    Args:
        sizes: the number of rows of each part.
        seed: of the digits.
    """
    rows: dict[str, list[dict[str, str]]] = {part: [] for part in sizes}
    for row in draw_rows(seed):
        part = rows[part_of(row["response"])]
        if len(part) < sizes[part_of(row["response"])]:
            part.append(row)
        elif all(len(rows[name]) == size for name, size in sizes.items()):
            break
    for name in sizes:
        if name != "sft":
            rows[name] = [{"prompt": row["prompt"], "answer": row["response"]} for row in rows[name]]
    return rows


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character, and distinct tokens for padding and the end."""
    tokenizer = Tokenizer(models.WordLevel({token: n for n, token in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)


def build_model(seed: int, layers: int = 2, width: int = 96) -> LlamaForCausalLM:
    """Return a Llama with random weights."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        pad_token_id=VOCABULARY.index(PAD),
        eos_token_id=VOCABULARY.index(END),
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = config.eos_token_id
    return model


def prepare(out: Path, seed: int) -> None:
    """Write models and one JSONL file per part into `out`; the same seed writes the same bytes.

    `actor_init` is the actor before SFT. `critic_init` is smaller: options/critic-smaller.yaml trains it as the critic.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name, model in (("actor_init", build_model(seed)), ("critic_init", build_model(seed, layers=1, width=48))):
        model.save_pretrained(str(out / name))
        build_tokenizer().save_pretrained(str(out / name))
    for part, rows in build_rows(SIZES, seed).items():
        write_text_atomic(out / f"{part}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
