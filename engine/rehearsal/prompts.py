"""The lengths of the prompts of a file."""

from __future__ import annotations

from pathlib import Path

from icegrt.config import PPOConfig
from icegrt.data import open_rows
from icegrt.data.tokenizer import load_tokenizer
from icegrt.data.training_data import encode_prompts
from icegrt.model.architecture import Architecture
from icegrt.utils.files import model_folder


def prompt_lengths(path: Path, config: PPOConfig, count: int) -> list[int]:
    """Return the tokens of `count` prompts: those of the file in order, repeated if it has fewer.

    Args:
        path: JSONL or Parquet file, as `ppo.prompts`.
        config: the actor's folder has the tokenizer; input_key and truncation are read too.
        count: of prompts.

    Raises:
        UserError: the file or the tokenizer cannot be read.
    """
    folder = model_folder(config.actor)
    tokenizer = load_tokenizer(folder)
    prompts = encode_prompts(
        open_rows(str(path), count, input_key=config.input_key),
        tokenizer,
        context=Architecture.from_pretrained(folder).context_length,
        max_new_tokens=config.sampling.max_new_tokens,
        key="ppo.sampling.max_new_tokens",
        truncation=config.truncation,
        name=str(path),
    )
    lengths = [len(prompt) for prompt in prompts]
    return [lengths[index % len(lengths)] for index in range(count)]
