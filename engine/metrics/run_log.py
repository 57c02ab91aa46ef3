"""The log of a run: `metrics.jsonl`, TensorBoard scalars and further loggers.

`RunLog` writes one JSON object per step to `metrics.jsonl`, and the same numbers under the same names to TensorBoard
and to the loggers of `metrics.sinks`. Steps and iterations count from 1; the `Evaluation` of iteration 0 is the one
before training. Only rank 0 opens a `RunLog`: records are already reduced over ranks.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from icegrt.errors import DataError, RunError
from icegrt.metrics.records import KINDS, Step
from icegrt.metrics.sinks import open_sinks
from icegrt.utils.console import warn
from icegrt.utils.files import json_line, json_safe, restore_json, write_text_atomic

__all__ = ["RunLog", "calibration_path", "drop_rollouts", "read_metrics", "rollout_path"]

METRICS_FILE = "metrics.jsonl"
_logger = logging.getLogger(__name__)


class RunLog:
    """The writer of a run's metrics.

    Args:
        dir: the run's folder.
        resume_from_step: the last step of the checkpoint (0: none yet; -1: not even the evaluation before training).
            Later rows are dropped, so that no step occurs twice. None: a new run.
        tensorboard: write TensorBoard scalars too.
        log_to: names of further loggers (wandb, mlflow).
        config: the resolved configuration, with secrets hidden, for those loggers.

    Raises:
        RunError: a new run's folder has metrics already.
        ConfigError: a further logger cannot start.
    """

    def __init__(
        self,
        dir: str | Path,
        resume_from_step: int | None = None,
        *,
        tensorboard: bool = True,
        log_to: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ):
        self.dir = Path(dir)
        self.path = self.dir / METRICS_FILE
        self._resume_from_step = resume_from_step
        self._tensorboard = tensorboard
        self._writer: Any = None
        self.dir.mkdir(parents=True, exist_ok=True)
        if resume_from_step is None:
            if self.path.exists() and self.path.stat().st_size:
                raise RunError(
                    f"{self.path} already holds the metrics of a run. Set run.resume=true to continue it, "
                    f"or point run.dir to an empty folder."
                )
        elif self.path.exists():
            rows = [row for row in read_metrics(self.dir) if _index(row) <= resume_from_step]
            write_text_atomic(self.path, "".join(json_line(row) for row in rows))
        self._sinks = open_sinks(log_to, self.dir, config or {}, resume_from_step is not None)
        # Unbuffered: what the disk refuses stays in `_unwritten`, and a line is continued where the disk became full.
        self._file = io.FileIO(self.path, "ab")
        self._unwritten = b""
        self._warned: set[str] = set()

    def log(self, step: Step) -> None:
        """Write a record to all loggers: as a line of JSON, flushed, and as scalars.

        A full disk is a warning: the line follows when there is room again, at the latest in `sync`.
        """
        row = {"kind": KINDS[type(step)], **json_safe(step)}
        self._unwritten += json_line(row).encode("utf-8", "backslashreplace")
        try:
            self._write()
        except OSError as error:
            self._warn_once(f"{self.path}: rows wait in memory ({error.strerror or error}); make room on the disk")
        restored = restore_json(row)
        if self._tensorboard:
            try:
                self._log_scalars(restored)
            except OSError as error:  # of its writing thread, which has ended then
                self._tensorboard = False
                warn(f"TensorBoard gets no more metrics ({error.strerror or error}); {METRICS_FILE} does")
        for sink in self._sinks:
            sink.write(dict(_scalars(row["kind"], restored)), _index(row))

    def _write(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) or 0 :]

    def sync(self) -> None:
        """Flush all rows to the disk.

        Raises:
            RunError: the disk is full. A checkpoint is committed after its rows: they could not be restored from it.
        """
        try:
            self._write()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be written ({error.strerror or error}), so no checkpoint is written either; the "
                "ones before it are whole, so make room or repair the disk, and resume"
            ) from None

    def close(self) -> None:
        """Close all loggers. Closing twice does nothing."""
        if not self._file.closed:
            try:
                self._write()
            except OSError as error:
                rows = self._unwritten.count(b"\n")
                warn(f"{self.path}: the last {rows} rows are not in it ({error.strerror or error})")
            self._file.close()
        for sink in self._sinks:
            sink.close()
        self._sinks = []
        writer, self._writer, self._tensorboard = self._writer, None, False
        if writer is not None:
            with contextlib.suppress(OSError):  # reported before
                writer.close()

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warn(message)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _log_scalars(self, row: dict[str, Any]) -> None:
        if self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                _logger.warning("tensorboard is not installed: scalars are in %s only", self.path)
                self._tensorboard = False
                return
            purge_step = None if self._resume_from_step is None else self._resume_from_step + 1
            self._writer = SummaryWriter(str(self.dir / "tensorboard"), purge_step=purge_step)
        index = _index(row)
        for name, value in _scalars(row["kind"], row):
            self._writer.add_scalar(name, value, index)
        self._writer.flush()


def rollout_path(dir: str | Path, iteration: int) -> Path:
    """Return the path of an iteration's responses: `<dir>/rollouts/iteration_00012.jsonl`."""
    return Path(dir) / "rollouts" / f"iteration_{iteration:05d}.jsonl"


def calibration_path(dir: str | Path, iteration: int) -> Path:
    """Return the path of an iteration's value calibration: `<dir>/value_calibration/iteration_00012.json`."""
    return Path(dir) / "value_calibration" / f"iteration_{iteration:05d}.json"


def drop_rollouts(dir: str | Path, after: int) -> None:
    """Remove the responses of iterations after `after`, which a resumed run samples again, and their calibration."""
    rollouts = rollout_path(dir, 0).parent.glob("iteration_*.jsonl")
    for path in [*rollouts, *calibration_path(dir, 0).parent.glob("iteration_*.json")]:
        if int(path.stem.removeprefix("iteration_")) > after:
            path.unlink()


def read_metrics(dir: str | Path) -> list[dict[str, Any]]:
    """Return all rows of a run's `metrics.jsonl`, in order; no rows if the folder has no such file.

    Each row has `kind` (ppo, sft, reward, evaluation). If a step was logged twice, the last row counts. A truncated
    line at the end is ignored.

    Raises:
        DataError: a line before the last is no JSON.
    """
    path = Path(dir) / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    n_lines = max((number for number, line in enumerate(lines, 1) if line.strip()), default=0)
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for number, line in enumerate(lines[:n_lines], 1):
        if not line.strip():
            continue
        try:
            row = restore_json(json.loads(line.decode("utf-8")))
            key = (row["kind"], _index(row))
        except (ValueError, KeyError, TypeError) as error:
            if number == n_lines:
                break
            raise DataError(f"{path}, line {number}: not a row of metrics ({error}). Restore or remove it.") from None
        rows.pop(key, None)
        rows[key] = row
    return list(rows.values())


def _index(row: dict[str, Any]) -> int:
    return int(row["iteration"] if "iteration" in row else row["step"])


def _scalars(prefix: str, row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _scalars(key if key == "evaluation" else f"{prefix}/{key}", value)
        elif isinstance(value, str) or value is None or key in ("iteration", "step"):
            continue
        else:
            yield f"{prefix}/{key}", float(value)
