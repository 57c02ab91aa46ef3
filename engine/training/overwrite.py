"""Replace an earlier run in its folder (`run.overwrite`): moved aside at first, removed when the new run has begun.

config.yaml    is moved aside first and restored last, so it is in the folder only while a whole run is there
.replaced/     the files of the earlier run; a start that fails, or one that was killed, moves them back
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from icegrt.config import CONFIG_FILE
from icegrt.errors import RunError

REPLACED = ".replaced"
# What a run writes into its folder. Other files there belong to the user, and stay.
_RUN_FILE = re.compile(
    r"config(\.\d+)?\.yaml|metrics\.jsonl|checkpoints|rollouts|value_calibration|profile|tensorboard|tokenizer"
    r"|(model|adapter)(\.writing|\.replaced)?|summary\.json|memory\.json|report\.(html|json)|curves\.png|loggers\.json|wandb|\..+\.partial"
)


def run_files(folder: Path) -> list[Path]:
    """Return the files and folders that a run has written into `folder`, its configuration first."""
    paths = [path for path in folder.iterdir() if _RUN_FILE.fullmatch(path.name)]
    return sorted(paths, key=lambda path: (path.name != CONFIG_FILE, path.name))


def check_no_input(folder: Path, inputs: Any, key: str) -> None:
    """Check that a new run reads nothing of the run that it would replace.

    Args:
        folder: the run's folder.
        inputs: values in which paths may occur: texts, paths, mappings, sequences and dataclasses of them.
        key: the configuration key `run.overwrite`, for the message.

    Raises:
        RunError: an input lies in the folder.
    """
    own = os.path.realpath(folder)
    replaced = [os.path.realpath(path) for path in run_files(folder)]
    for text in _texts(inputs):
        for candidate in filter(os.path.exists, (text, text.rpartition(":")[0])):  # a reward function is FILE:FUNCTION
            path = os.path.realpath(candidate)
            # The folder itself as a model means the model that the earlier run has exported.
            if path == own or any(os.path.commonpath([path, file]) == file for file in replaced):
                raise RunError(
                    f"{key}: the new run reads {candidate}, which would be replaced; move it elsewhere first, or set "
                    f"{key.replace('overwrite', 'dir')} to another folder"
                )


def move_aside(folder: Path) -> bool:
    """Move the files of the run in `folder` to `.replaced`. Returns whether there were any."""
    paths = run_files(folder)
    if paths:
        aside = folder / REPLACED
        aside.mkdir(exist_ok=True)
        for path in paths:
            _remove(aside / path.name)
            os.replace(path, aside / path.name)
    return bool(paths)


def move_back(folder: Path) -> None:
    """Undo `move_aside` after a start that failed; what that start has written is removed."""
    aside = folder / REPLACED
    if aside.is_dir():
        for path in reversed(run_files(aside)):
            _remove(folder / path.name)
            os.replace(path, folder / path.name)
        aside.rmdir()


def remove_replaced(folder: Path) -> None:
    """Remove the earlier run for good: the new one has begun."""
    shutil.rmtree(folder / REPLACED, ignore_errors=True)


def recover_replaced(folder: Path) -> bool:
    """Complete what a killed start left. Returns whether the earlier run is back, because the new one had not begun."""
    if not (folder / REPLACED).is_dir():
        return False
    if (folder / CONFIG_FILE).exists():
        remove_replaced(folder)
        return False
    move_back(folder)
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, (str, Path)):
        yield str(value)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
    elif hasattr(value, "__dataclass_fields__"):
        yield from _texts(vars(value))
