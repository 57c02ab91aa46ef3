"""What a run derives from its language model: the tokenizer, and the logit chunk size."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
import torch.distributed as dist

from icegrt.data import check_tokenizer, load_tokenizer
from icegrt.data.tokenizer import check_vocabulary
from icegrt.data.types import Tokenizer, TokenizerSource
from icegrt.errors import ConfigError
from icegrt.kernels import default_chunk_rows
from icegrt.model.architecture import Architecture
from icegrt.model.hf.reader import ModelSource
from icegrt.utils.console import print_info


def tokenizer_for(tokenizer: TokenizerSource | None, model: ModelSource, architecture: Architecture) -> Tokenizer:
    """Return `tokenizer`, or the one in the model's folder, checked against the model's vocabulary.

    Args:
        tokenizer: a tokenizer, the path of its folder, or None.
        model: path or `transformers` model.
        architecture: of the model.

    Raises:
        ConfigError: there is no tokenizer, or it has more tokens than the model.
    """
    if tokenizer is None or isinstance(tokenizer, (str, PathLike)):
        folder = tokenizer or (model if isinstance(model, (str, Path)) else None)
        if folder is None:
            raise ConfigError("a model in memory comes without a tokenizer; pass tokenizer=")
        checked: Tokenizer = load_tokenizer(str(folder), print_info=print_info)
    else:
        checked = tokenizer
        check_tokenizer(checked, print_info=print_info)
    check_vocabulary(checked, architecture.vocab_size)
    return checked


def resolve_chunk_rows(configured: int, architecture: Architecture, resumed: int | None = None) -> int:
    """Return the logit chunk size of a run, in rows: the same on all ranks. Collective.

    Call it once per run, after models and optimizers are allocated.

    Args:
        configured: the key; 0: choose by vocabulary and free device memory.
        architecture: of the language model.
        resumed: that of the checkpoint to resume from, which replaces a choice: other chunks round differently.
    """
    if chunk_rows := configured or resumed:
        return chunk_rows
    if not torch.cuda.is_available():
        return default_chunk_rows(architecture.vocab_size)
    free = torch.tensor(torch.cuda.mem_get_info()[0], device="cuda")
    dist.all_reduce(free, op=dist.ReduceOp.MIN)
    return default_chunk_rows(architecture.vocab_size, "cuda", int(free))
