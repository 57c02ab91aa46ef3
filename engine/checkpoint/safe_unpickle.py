"""What of a checkpoint is a pickle, read through allow-lists: a class that no checkpoint has is refused by name.

PyTorch's distributed checkpoints have pickles in three places, and Megatron adds a fourth: `.metadata` (torch unpickles
it without any check), the byte entries of the data files (likewise), the tensors in them, and `common.pt`. The last
three are `torch.save`d, so torch's own restricted unpickler reads them.
"""

from __future__ import annotations

import contextlib
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, Metadata
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.metadata import StorageMeta

from icegrt.errors import CheckpointError, UserError

_METADATA, _PLANNER = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"
_IN_METADATA = frozenset(
    [
        *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
        *((_METADATA, f"{kind}StorageMetadata") for kind in ("Tensor", "Bytes", "Chunk")),
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        *((_PLANNER, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        *(("torch", str(x).removeprefix("torch.")) for x in vars(torch).values() if isinstance(x, torch.dtype)),
    ]
)
_REFUSED_BY_TORCH = re.compile(r"GLOBAL (\S+)")
_REMEDY = "no checkpoint of icegrt holds one; do not use this file, take an earlier checkpoint"


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], where: Path) -> None:
        super().__init__(stream)
        self.where = where

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _IN_METADATA:
            raise CheckpointError(f"{self.where}: asks for `{module}.{name}`; {_REMEDY}")
        return super().find_class(module, name)


def read_metadata(folder: Path) -> Metadata:
    """The `.metadata` of a distributed checkpoint."""
    path = folder / ".metadata"
    try:
        with open(path, "rb") as stream:
            metadata = _MetadataUnpickler(stream, path).load()
    except UserError:
        raise
    except Exception as error:  # absent, cut short, or no pickle at all
        raise CheckpointError(f"{path}: cannot be read ({error}); use an earlier checkpoint") from None
    if not isinstance(metadata, Metadata) or metadata.storage_data is None:
        raise CheckpointError(f"{path}: is not the metadata of a checkpoint; use an earlier one")
    for entry in metadata.storage_data.values():
        if (folder / entry.relative_path).resolve().parent != folder.resolve():
            raise CheckpointError(f"{path}: names {entry.relative_path}, which is outside of {folder}")
    return metadata


def load_object(source: str | Path | IO[bytes], where: str | Path) -> Any:
    """What `torch.save` wrote: tensors and plain containers, no class beside those that torch knows to be harmless."""
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{where}: {in_words(error)}") from None
    except Exception as error:
        raise CheckpointError(f"{where}: cannot be read ({error}); use an earlier checkpoint") from None


def in_words(error: BaseException) -> str:
    """What is wrong with an archive, in one line: torch says it in twelve."""
    named = _REFUSED_BY_TORCH.search(str(error))
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return f"asks for `{named[1]}`; {_REMEDY}" if named else f"cannot be read ({first})"


class Reader(FileSystemReader):
    """torch's reader of a folder, with its metadata read by `read_metadata`, once."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._known: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._known is None:
            self._known = read_metadata(Path(self.path))
            self._known.storage_meta = self._known.storage_meta or StorageMeta()
            self._known.storage_meta.load_id = self.load_id
        return self._known


@contextlib.contextmanager
def restricted_megatron_load(folder: Path) -> Iterator[Any]:
    """Inside, Megatron loads the checkpoint at `folder` by the functions above.

    Gives the strategy for `dist_checkpointing.load(common_strategy=...)`. Errors come out as `CheckpointError`.
    """
    from megatron.core.dist_checkpointing.strategies import torch as strategies
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy

    class Common(TorchCommonLoadStrategy):
        def load_common(self, checkpoint_dir: str | Path) -> Any:
            return load_object(Path(checkpoint_dir) / "common.pt", Path(checkpoint_dir) / "common.pt")

    class Planner(strategies.MCoreLoadPlanner):
        def load_bytes(self, read_item: Any, value: IO[bytes]) -> None:
            name = read_item.dest_index.fqn
            set_element(self.original_state_dict, self.mappings[name], load_object(value, f"{folder}, entry {name}"))

    before = strategies._get_filesystem_reader, strategies.MCoreLoadPlanner
    strategies._get_filesystem_reader = lambda path, cache_metadata=False: Reader(path)
    strategies.MCoreLoadPlanner = Planner
    try:
        yield Common()
    except CheckpointException as error:  # what ranks met while they read, by rank
        causes = [cause for cause, _ in error.failures.values()]
        ours = next((cause for cause in causes if isinstance(cause, UserError)), None)
        raise ours or CheckpointError(f"{folder}: {in_words(causes[0])}") from None
    finally:
        strategies._get_filesystem_reader, strategies.MCoreLoadPlanner = before
