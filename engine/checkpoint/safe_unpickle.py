"""Read the pickles of a checkpoint through allow-lists. An unexpected class is an error that names it.

PyTorch's distributed checkpoints hold pickles in three places: `.metadata`, and the byte entries and tensors of the
data files. Megatron adds `common.pt`. torch unpickles `.metadata` and byte entries without a check. Here `.metadata`
has an allow-list of its own; the others are `torch.save` files, which torch's restricted unpickler reads.
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
    """Return the `.metadata` of a distributed checkpoint.

    Raises:
        CheckpointError: it cannot be read, holds an unexpected class, or names a file outside of the folder.
    """
    path = folder / ".metadata"
    try:
        with open(path, "rb") as stream:
            metadata = _MetadataUnpickler(stream, path).load()
    except UserError:
        raise
    except Exception as error:  # missing, truncated, or not a pickle
        raise CheckpointError(f"{path}: cannot be read ({error}); use an earlier checkpoint") from None
    if not isinstance(metadata, Metadata) or metadata.storage_data is None:
        raise CheckpointError(f"{path}: is not the metadata of a checkpoint; use an earlier one")
    for entry in metadata.storage_data.values():
        if (folder / entry.relative_path).resolve().parent != folder.resolve():
            raise CheckpointError(f"{path}: names {entry.relative_path}, which is outside of {folder}")
    return metadata


def load_object(source: str | Path | IO[bytes], where: str | Path) -> Any:
    """Return the content of a `torch.save` file: tensors, plain containers, and classes that torch allows.

    Args:
        source: path or stream.
        where: name of the source in error messages.

    Raises:
        CheckpointError: it cannot be read, or holds another class.
    """
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{where}: {in_words(error)}") from None
    except Exception as error:
        raise CheckpointError(f"{where}: cannot be read ({error}); use an earlier checkpoint") from None


def in_words(error: BaseException) -> str:
    """Return torch's error about an archive as one line; torch's own message has twelve."""
    class_name = _REFUSED_BY_TORCH.search(str(error))
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    return f"asks for `{class_name[1]}`; {_REMEDY}" if class_name else f"cannot be read ({first_line})"


class Reader(FileSystemReader):
    """torch's reader of a checkpoint folder, with the safe `read_metadata`. The metadata are read once."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = read_metadata(Path(self.path))
            self._metadata.storage_meta = self._metadata.storage_meta or StorageMeta()
            self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


@contextlib.contextmanager
def restricted_megatron_load(folder: Path) -> Iterator[Any]:
    """Patch Megatron to load the checkpoint at `folder` by the functions of this module.

    Yields:
        The strategy for `dist_checkpointing.load(common_strategy=...)`.

    Raises:
        CheckpointError: a file cannot be read, or holds an unexpected class.
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
    except CheckpointException as error:  # the errors of all ranks
        causes = [cause for cause, _ in error.failures.values()]
        user_error = next((cause for cause in causes if isinstance(cause, UserError)), None)
        raise user_error or CheckpointError(f"{folder}: {in_words(causes[0])}") from None
    finally:
        strategies._get_filesystem_reader, strategies.MCoreLoadPlanner = before
