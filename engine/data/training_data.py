"""Open, check and report all data before training; split off held-out items; pack micro-batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from icegrt.config import DataSource
from icegrt.data import ConcatDataset, EncodedDataset, Prompt, PromptEncoder, open_rows, report_lengths
from icegrt.data.blend import shuffled
from icegrt.data.examples import Encoder, Truncation
from icegrt.data.rows import Row
from icegrt.data.types import Rows, Tokenizer
from icegrt.errors import ConfigError, DataError
from icegrt.packing import Share
from icegrt.utils.console import print_info, warn

_CACHED_TOKENS = 2_000_000  # up to this many tokens, packed micro-batches stay in memory


def encode_sources(
    key: str, files: Sequence[DataSource], rows: Rows | None, encoder: Encoder
) -> list[tuple[EncodedDataset, float]]:
    """Encode `rows`, or `files` if `rows` is None, and report their lengths.

    Args:
        key: the configuration key, as a name for rows from Python.
        files: the configured files.
        rows: rows from Python, or a path.
        encoder: turns rows into items.

    Returns:
        Each dataset with its weight.

    Raises:
        DataError: a row cannot be used; it names file and line.
    """
    sources = [(DataSource(), rows)] if rows is not None else [(source, source.path) for source in files]
    datasets = []
    for source, path_or_rows in sources:
        opened = open_rows(path_or_rows, input_key=source.input_key, output_key=source.output_key)
        name = str(path_or_rows) if isinstance(path_or_rows, (str, Path)) else key
        datasets.append((EncodedDataset(opened, encoder, name), source.weight))
    report_lengths([dataset for dataset, _ in datasets])
    return datasets


def encode_prompts(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    context: int,
    max_new_tokens: int,
    key: str,
    truncation: Truncation = "error",
    chat: bool = True,
    name: str = "prompts",
) -> EncodedDataset[Prompt]:
    """Encode rows as prompts that leave room for the answer in the model's context.

    Args:
        rows: the rows of the prompts (`open_rows`).
        tokenizer: see `check_tokenizer`.
        context: tokens of the model's context.
        max_new_tokens: tokens of the longest answer.
        key: the configuration key of `max_new_tokens`, for the error message.
        truncation: for a prompt that leaves no room: "error", "drop" or "left" (see `PromptEncoder`).
        chat: use the chat template, if the tokenizer has one.
        name: names the data in tables and messages.

    Raises:
        ConfigError: `max_new_tokens` fills the context.
        DataError: a row cannot be used, or no prompt remains.
    """
    room = context - max_new_tokens
    if room < 1:
        raise ConfigError(f"{key} {max_new_tokens} leaves no room for a prompt: the model has context {context}")
    reason = f"context {context} - max_new_tokens {max_new_tokens} leaves {room}"
    return EncodedDataset(rows, PromptEncoder(tokenizer, room, truncation, chat=chat, limit_reason=reason), name)


def hold_out(
    sources: Sequence[tuple[EncodedDataset, float]], fraction: float, seed: int
) -> tuple[list[tuple[EncodedDataset, float]], list[EncodedDataset]]:
    """Split the prompts of a random `fraction` of every source's items off, at least one item and never all.

    All items of one prompt are on one side, whichever rows and sources they come from.

    Returns:
        The training datasets with their weights, and the held-out datasets.

    Raises:
        DataError: every prompt of a source is held out of another one.
    """
    # 1. Choose prompts, in a random order of each source's items.
    prompts_by_source = [_prompt_hashes(items) for items, _ in sources]
    heldout_prompts: set[int] = set()
    for index, prompts in enumerate(prompts_by_source):
        counts = Counter(prompts)
        wanted = min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
        heldout_count = sum(counts[prompt] for prompt in heldout_prompts & counts.keys())
        for item in shuffled(len(prompts), seed, index).tolist():
            prompt = prompts[item]
            if heldout_count >= wanted:
                break
            if prompt not in heldout_prompts and heldout_count + counts[prompt] < len(prompts):
                heldout_prompts.add(prompt)
                heldout_count += counts[prompt]
    # 2. Split every source by them.
    training, heldout = [], []
    for (items, weight), prompts in zip(sources, prompts_by_source, strict=True):
        is_heldout = np.array([prompt in heldout_prompts for prompt in prompts])
        if is_heldout.any():
            heldout.append(items.subset(np.flatnonzero(is_heldout)))
        training.append((_training_items(items, is_heldout), weight))
    if not heldout:
        warn(f"{sources[0][0].name}: only one prompt, so none is held out; give held-out data to see what is learned")
    return training, heldout


def exclude_heldout(
    sources: Sequence[tuple[EncodedDataset, float]], heldout: Sequence[EncodedDataset]
) -> list[tuple[EncodedDataset, float]]:
    """Return the sources without the items whose prompt is held out, and print how many there were.

    A source whose prompts are all held out stays complete, with a warning: it was given for both.
    """
    heldout_prompts = {prompt for items in heldout for prompt in _prompt_hashes(items)}
    training = []
    for items, weight in sources:
        is_heldout = np.array([prompt in heldout_prompts for prompt in _prompt_hashes(items)])
        if is_heldout.all():
            warn(f"{items.name}: all of its prompts are held out too, so held-out figures do not measure learning")
            is_heldout[:] = False
        elif is_heldout.any():
            print_info(f"{items.name}: {is_heldout.sum():,} of {len(items):,} rows have a held-out prompt: dropped")
        training.append((_training_items(items, is_heldout), weight))
    return training


def _training_items(items: EncodedDataset, is_heldout: np.ndarray) -> EncodedDataset:
    if is_heldout.all():
        raise DataError(f"{items.name}: all of its prompts are held out, so nothing is left to train on; remove it")
    return items.subset(np.flatnonzero(~is_heldout)) if is_heldout.any() else items


def _prompt_hashes(items: EncodedDataset) -> list[int]:
    return [hash(tuple(item.prompt)) for item in items]  # of integers: the same on all ranks


class LazyMicroBatches(Sequence):
    """Micro-batches of at most `token_budget` tokens; each is packed on access."""

    def __init__(self, items: ConcatDataset, token_budget: int, pack_group: Callable[..., Any], share: Share) -> None:
        self._items, self._pack = items, partial(pack_group, tail_multiple=share.tail_multiple)
        self._groups = share.assign(items.lengths.tolist(), token_budget)[share.rank]

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._pack([self._items[i] for i in self._groups[index]])


def packed(
    items: ConcatDataset, token_budget: int, pack_group: Callable[..., Any], share: Share | None = None
) -> Sequence:
    """Return this rank's share of the items (`share` None: all) as micro-batches; no items give none.

    `pack_group(items, tail_multiple=...)` packs one micro-batch. Small data is packed once and stays in memory; large
    data is packed on access.
    """
    if not len(items):
        return []
    batches = LazyMicroBatches(items, token_budget, pack_group, share or Share())
    return list(batches) if items.lengths.sum(dtype="int64") <= _CACHED_TOKENS else batches
