"""The checkpoints of a run as files: write, verify, commit, prune, recover. This module does not import torch.

Files are written to a staging directory, fsynced and listed in a manifest. One rename then commits the checkpoint. So
a directory with the final name is complete, whenever the process or the machine stops.

checkpoints/step_000040/           a committed checkpoint; 40 is the number of finished steps
    actor/, critic/                Megatron's files, by role
    state.json                     everything but tensors
    manifest.json                  size and SHA-256 of every file above
checkpoints/step_000045.writing/   the staging directory of a checkpoint, or what a crash left of it
checkpoints/step_000035.damaged/   a quarantined checkpoint: it did not match its manifest on resume
checkpoints/*.replaced, *.deleted  a checkpoint that is being replaced or deleted
checkpoints/latest, best           text files of one line: the name of a committed checkpoint
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
from icegrt.utils import files
from icegrt.utils.files import fsync_path, staging_path, write_text_atomic

STATE, MANIFEST, LATEST, BEST = "state.json", "manifest.json", "latest", "best"
_NAME = re.compile(r"step_(\d{6,})")
_WRITING, _REPLACED, _DELETED, _DAMAGED = ".writing", ".replaced", ".deleted", ".damaged"
_FORMAT = 1
_BLOCK_BYTES = 1 << 20

# {"bytes": size of a file, "sha256": its digest in hexadecimal}
Digest = dict[str, Any]


def checkpoints_dir(run_dir: str | Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return Path(run_dir) / "checkpoints"


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """Return committed checkpoints, oldest first. `verify` checks them."""
    folder = checkpoints_dir(run_dir)
    checkpoints = [p for p in folder.iterdir() if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(checkpoints, key=lambda p: int(_NAME.fullmatch(p.name)[1]))


def checkpoint_path(run_dir: str | Path, step: int) -> Path:
    """Return the path of the checkpoint of `step`. It need not exist."""
    return checkpoints_dir(run_dir) / f"step_{step:06d}"


# -- the manifest ------------------------------------------------------------------------------------------------------


def fsync_digest(path: Path) -> Digest:
    """Fsync a new file and return its digest."""
    digest = _digest(path)
    fsync_path(path)
    return digest


def write_manifest(staging: Path, digests: dict[str, Digest]) -> None:
    """Write the manifest of all files in a staging directory, and fsync files and folders.

    Args:
        staging: the staging directory.
        digests: digests of the files that the ranks wrote, by name under `staging`. Other files are read.

    Raises:
        OSError: a file of another rank is not visible on this machine.
    """
    paths = {path.relative_to(staging).as_posix(): path for path in staging.rglob("*") if path.is_file()}
    for name, digest in digests.items():
        if name not in paths or paths[name].stat().st_size != digest["bytes"]:
            raise OSError(errno.ENOENT, f"{name}, which another rank wrote, is not here: all ranks need the same disk")
    entries = {name: digests.get(name) or fsync_digest(path) for name, path in sorted(paths.items())}
    write_text_atomic(staging / MANIFEST, json.dumps({"format": _FORMAT, "files": entries}, indent=1) + "\n")
    for folder in [p for p in staging.rglob("*") if p.is_dir()] + [staging]:
        fsync_path(folder)


def verify(checkpoint: Path, *, only: Iterable[str] = (), rank: int = 0, ranks: int = 1) -> list[str]:
    """Compare a checkpoint with its manifest.

    Args:
        checkpoint: the checkpoint.
        only: names of files or folders to verify; empty verifies everything.
        rank: index of this reader.
        ranks: number of readers; each reads a part of the files.

    Returns:
        The faults, at most one a file; an empty list if the checkpoint is intact.
    """
    try:
        digests = read_manifest(checkpoint)
    except CheckpointError as error:
        return [str(error).removeprefix(f"{checkpoint}: ")]
    names = [n for n in digests if not only or n in only or n.split("/")[0] in only]
    return [fault for name in names[rank::ranks] if (fault := _fault_of(checkpoint, name, digests[name]))]


def read_manifest(checkpoint: Path) -> dict[str, Digest]:
    """Return the digests of a checkpoint's files, by name.

    Raises:
        CheckpointError: the manifest is missing or cannot be read.
    """
    try:
        document = json.loads((checkpoint / MANIFEST).read_bytes())
        if document["format"] != _FORMAT:
            raise ValueError(f"format {document['format']}, expected {_FORMAT}")
        digests = {
            str(name): {"bytes": int(d["bytes"]), "sha256": str(d["sha256"])} for name, d in document["files"].items()
        }
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint}: {MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint}: {MANIFEST} cannot be read ({error})") from None
    for name in digests:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise CheckpointError(f"{checkpoint}: {MANIFEST} names {name}, which is outside of the checkpoint")
    return digests


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


# -- staging, commit, removal ----------------------------------------------------------------------------------------


def create_staging(checkpoint: Path, parts: Iterable[str]) -> None:
    """Create an empty staging directory for a checkpoint, with a folder for each of `parts`."""
    staging = files.create_staging(checkpoint)
    for part in parts:
        (staging / part).mkdir()


def commit(checkpoint: Path) -> None:
    """Rename a staging directory with a manifest to its final name, and update `latest`.

    A checkpoint of the same step is replaced. A complete one is on the disk at every instant.
    """
    files.commit_folder(checkpoint, replace=True)
    write_text_atomic(checkpoint.parent / LATEST, checkpoint.name + "\n")


def discard(checkpoint: Path) -> None:
    """Remove the staging directory of a checkpoint."""
    shutil.rmtree(staging_path(checkpoint), ignore_errors=True)


def prune(run_dir: str | Path, keep: int) -> list[str]:
    """Update `best`, and delete all checkpoints but the last `keep` and the best one.

    Returns:
        What could not be written or deleted, one description each.
    """
    problems = []
    checkpoints = list_checkpoints(run_dir)
    best = best_of(checkpoints)
    if best is not None:
        try:
            write_text_atomic(best.parent / BEST, best.name + "\n")
        except OSError as error:
            problems.append(f"{best.parent / BEST}: cannot be written ({error.strerror or error})")
    for checkpoint in checkpoints[:-keep]:
        if checkpoint != best:
            try:
                _delete(checkpoint)
            except OSError as error:
                problems.append(f"{checkpoint}: cannot be deleted ({error.strerror or error}); delete it by hand")
    return problems


def best_of(checkpoints: Iterable[Path]) -> Path | None:
    """Return the checkpoint of the highest `quality`, the earliest of equals; None if none has a finite quality."""
    rated: list[tuple[float, Path]] = []
    for checkpoint in checkpoints:
        with contextlib.suppress(CheckpointError):
            quality = read_state(checkpoint).get("quality")
            if quality is not None and math.isfinite(quality):
                rated.append((float(quality), checkpoint))
    return max(rated, key=lambda pair: pair[0])[1] if rated else None


def recover(run_dir: str | Path) -> None:
    """Clean up after a killed run: restore a checkpoint that was being replaced, remove unfinished and deleted ones."""
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
    """Rename a damaged checkpoint, so that no run uses it. Returns its new path."""
    quarantined = checkpoint.with_name(checkpoint.name + _DAMAGED)
    shutil.rmtree(quarantined, ignore_errors=True)
    os.replace(checkpoint, quarantined)
    return quarantined


def latest_valid(
    checkpoints: list[Path], faults_of: Callable[[Path], list[str]] = verify
) -> tuple[Path | None, dict[Path, list[str]]]:
    """Return the last checkpoint without faults, and the faults of later ones.

    Args:
        checkpoints: oldest first.
        faults_of: returns the faults of a checkpoint.

    Returns:
        The checkpoint, or None if all have faults; and the faults of the later checkpoints, newest first.
    """
    damaged: dict[Path, list[str]] = {}
    for checkpoint in reversed(checkpoints):
        damaged[checkpoint] = faults_of(checkpoint)
        if not damaged[checkpoint]:
            del damaged[checkpoint]
            return checkpoint, damaged
    return None, damaged


def describe_faults(checkpoint: Path, faults: list[str]) -> str:
    """Return a checkpoint's faults in one line."""
    more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
    return f"{checkpoint}: damaged: {faults[0]}{more}"


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the JSON document of a checkpoint.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = checkpoint / STATE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); resume from an earlier checkpoint") from None


def write_state(staging: Path, text: str) -> None:
    """Write the JSON document of a checkpoint into its staging directory."""
    write_text_atomic(staging / STATE, text)


def _delete(checkpoint: Path) -> None:
    # Renamed first: a checkpoint that is half removed must not have the name of a complete one.
    deleted = checkpoint.with_name(checkpoint.name + _DELETED)
    shutil.rmtree(deleted, ignore_errors=True)
    os.replace(checkpoint, deleted)
    shutil.rmtree(deleted, ignore_errors=True)


def _digest(path: Path) -> Digest:
    sha256, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            sha256.update(block)
            size += len(block)
    return {"bytes": size, "sha256": sha256.hexdigest()}
