"""The checkpoints of a run as files: which are whole, which is the last, which the best. No torch in here.

checkpoints/step_000040/           a whole checkpoint; the name is given by a rename, once all of it is on the disk
    actor/, critic/                what Megatron wrote, by role
    state.json                     everything that is no tensor
    manifest.json                  the size and the SHA-256 of every file above
checkpoints/step_000045.writing/   one being written, or left behind when its run ended
checkpoints/step_000035.damaged/   one that did not agree with its manifest when a run was to go on from it
checkpoints/latest, best           one line each: the name of a whole checkpoint
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from icegrt.errors import CheckpointError

STATE, MANIFEST, LATEST, BEST = "state.json", "manifest.json", "latest", "best"
_NAME = re.compile(r"step_(\d{6,})")
_WRITING, _REPLACED, _DELETED, _DAMAGED = ".writing", ".replaced", ".deleted", ".damaged"
_FORMAT = 1
_BLOCK_BYTES = 1 << 20

# Of a file: {"bytes": its size, "sha256": in hexadecimal}.
Digest = dict[str, Any]


def checkpoints_dir(run_dir: str | Path) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """Finished checkpoints, oldest first. Whether they are still whole is for `verify` to say."""
    folder = checkpoints_dir(run_dir)
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(_NAME.fullmatch(p.name)[1]))


def checkpoint_path(run_dir: str | Path, step: int) -> Path:
    """The checkpoint of `step`, whether it exists or not."""
    return checkpoints_dir(run_dir) / f"step_{step:06d}"


def staging_path(checkpoint: Path) -> Path:
    """Where a checkpoint is while it is written."""
    return _with(checkpoint, _WRITING)


# -- the manifest ------------------------------------------------------------------------------------------------------


def fsync_digest(path: Path) -> Digest:
    """The digest of a file that was just written; its bytes are on the disk when this returns."""
    found = _digest(path)
    _sync(path)
    return found


def write_manifest(staging: Path, digests: dict[str, Digest]) -> None:
    """Write the manifest of all files under `staging`, and see to it that all of it is on the disk.

    digests: of files that other ranks have written, by their names under `staging`; the others are read here. Raises
    `OSError` where a file of another rank cannot be seen from here.
    """
    found = {path.relative_to(staging).as_posix(): path for path in staging.rglob("*") if path.is_file()}
    for name, digest in digests.items():
        if name not in found or found[name].stat().st_size != digest["bytes"]:
            raise OSError(errno.ENOENT, f"{name}, which another rank wrote, is not here: all ranks need the same disk")
    files = {name: digests.get(name) or fsync_digest(path) for name, path in sorted(found.items())}
    _write(staging / MANIFEST, json.dumps({"format": _FORMAT, "files": files}, indent=1) + "\n")
    for folder in [p for p in staging.rglob("*") if p.is_dir()] + [staging]:
        _sync(folder)


def verify(checkpoint: Path, *, only: Iterable[str] = (), rank: int = 0, ranks: int = 1) -> list[str]:
    """What is wrong with a checkpoint, file by file; an empty list if it is as it was written.

    only: names of files, or of folders with all in them (default: everything). Of `ranks` readers each reads a part.
    """
    try:
        files = read_manifest(checkpoint)
    except CheckpointError as error:
        return [str(error).removeprefix(f"{checkpoint}: ")]
    wanted = [n for n in files if not only or n in only or n.split("/")[0] in only]
    return [fault for name in wanted[rank::ranks] if (fault := _fault_of(checkpoint, name, files[name]))]


def read_manifest(checkpoint: Path) -> dict[str, Digest]:
    """The digests of a checkpoint's files, by name. Raises `CheckpointError` where there is no manifest to read."""
    try:
        document = json.loads((checkpoint / MANIFEST).read_bytes())
        if document["format"] != _FORMAT:
            raise ValueError(f"format {document['format']}, expected {_FORMAT}")
        files = {
            str(name): {"bytes": int(d["bytes"]), "sha256": str(d["sha256"])} for name, d in document["files"].items()
        }
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint}: {MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint}: {MANIFEST} cannot be read ({error})") from None
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise CheckpointError(f"{checkpoint}: {MANIFEST} names {name}, which is outside of the checkpoint")
    return files


def _fault_of(checkpoint: Path, name: str, expected: Digest) -> str | None:
    path = checkpoint / name
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{name} has {size} bytes, not {expected['bytes']}"
        if _digest(path)["sha256"] != expected["sha256"]:
            return f"{name} has changed since it was written (another SHA-256)"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"
    return None


# -- from writing to whole, and away -----------------------------------------------------------------------------------


def create_staging(checkpoint: Path, parts: Iterable[str]) -> None:
    """An empty place to write a checkpoint, with a folder for each of `parts`."""
    staging = staging_path(checkpoint)
    shutil.rmtree(staging, ignore_errors=True)
    for part in parts:
        (staging / part).mkdir(parents=True)


def commit(checkpoint: Path) -> None:
    """Give a sealed checkpoint its name, and point `latest` at it. At no instant is there less than before."""
    before = _with(checkpoint, _REPLACED)
    if checkpoint.exists():
        shutil.rmtree(before, ignore_errors=True)
        os.replace(checkpoint, before)
    os.replace(staging_path(checkpoint), checkpoint)
    _sync(checkpoint.parent)
    _point(checkpoint.parent / LATEST, checkpoint.name)
    if before.exists():
        _delete(before)


def discard(checkpoint: Path) -> None:
    """Remove what was written of a checkpoint that will not be finished."""
    shutil.rmtree(staging_path(checkpoint), ignore_errors=True)


def prune(run_dir: str | Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints and the best one, and point `best` at that."""
    found = list_checkpoints(run_dir)
    best = best_of(found)
    if best is not None:
        _point(best.parent / BEST, best.name)
    for old in found[:-keep]:
        if old != best:
            _delete(old)


def best_of(checkpoints: Iterable[Path]) -> Path | None:
    """The one whose state has the highest `quality`, the earliest of equals; None if none has any."""
    known: list[tuple[float, Path]] = []
    for checkpoint in checkpoints:
        with contextlib.suppress(CheckpointError):
            quality = read_state(checkpoint).get("quality")
            if quality is not None and math.isfinite(quality):
                known.append((float(quality), checkpoint))
    return max(known, key=lambda pair: pair[0])[1] if known else None


def recover(run_dir: str | Path) -> None:
    """Clear up after a run that was killed: put back what it was about to replace, remove what it never finished."""
    folder = checkpoints_dir(run_dir)
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        name, suffix = os.path.splitext(path.name)
        if not _NAME.fullmatch(name) or suffix not in (_WRITING, _REPLACED, _DELETED):
            continue
        if suffix == _REPLACED and not (folder / name).exists():
            os.replace(path, folder / name)
        else:
            shutil.rmtree(path, ignore_errors=True)


def quarantine(checkpoint: Path) -> Path:
    """Take a damaged checkpoint out of the count, to be looked at. Returns where it is now."""
    place = _with(checkpoint, _DAMAGED)
    shutil.rmtree(place, ignore_errors=True)
    os.replace(checkpoint, place)
    return place


def latest_valid(
    checkpoints: list[Path], faults_of: Callable[[Path], list[str]] = verify
) -> tuple[Path | None, dict[Path, list[str]]]:
    """The last of `checkpoints` (oldest first) without faults, and the faults of those after it, newest first."""
    damaged: dict[Path, list[str]] = {}
    for checkpoint in reversed(checkpoints):
        damaged[checkpoint] = faults_of(checkpoint)
        if not damaged[checkpoint]:
            del damaged[checkpoint]
            return checkpoint, damaged
    return None, damaged


def describe_faults(checkpoint: Path, found: list[str]) -> str:
    """A checkpoint's faults in one line."""
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    return f"{checkpoint}: damaged: {found[0]}{more}"


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    path = checkpoint / STATE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); resume from an earlier checkpoint") from None


def write_state(staging: Path, text: str) -> None:
    """Write the JSON part of a checkpoint that is being written."""
    _write(staging / STATE, text)


# -- small things ------------------------------------------------------------------------------------------------------


def _with(checkpoint: Path, suffix: str) -> Path:
    return checkpoint.with_name(checkpoint.name + suffix)


def _delete(path: Path) -> None:
    # Renamed first: half of a checkpoint must not be seen under a whole one's name.
    gone = path.with_name(os.path.splitext(path.name)[0] + _DELETED)
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _point(path: Path, name: str) -> None:
    staging = path.with_name(f".{path.name}")
    _write(staging, name + "\n")
    os.replace(staging, path)
    _sync(path.parent)


def _digest(path: Path) -> Digest:
    sha256, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            sha256.update(block)
            size += len(block)
    return {"bytes": size, "sha256": sha256.hexdigest()}


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems cannot do this for folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
