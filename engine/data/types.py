"""Types of the arguments that callers pass, as protocols of the methods that the engine calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any, Protocol

from icegrt.data.rows import Row


class Tokenizer(Protocol):
    """A `transformers` tokenizer.

    The engine also reads `eos_token_id`, `pad_token_id` and the chat template. `transformers` looks these up when they
    are read, so type checkers do not find them on the class.
    """

    def __len__(self) -> int: ...

    def __call__(self, text: Any, /) -> Any: ...

    def decode(self, token_ids: Any, /, *, skip_special_tokens: bool = ...) -> Any: ...

    def save_pretrained(self, save_directory: Any, /) -> Any: ...


class IndexedRows(Protocol):
    """Rows by index, such as a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


# A tokenizer, or the path of its folder.
TokenizerSource = Tokenizer | str | PathLike[str]

# The path of a file, dicts, or a dataset.
Rows = str | PathLike[str] | Iterable[Mapping[str, Any] | Row] | IndexedRows
