"""Run a study: freeze it, prepare, run the pilot, state the power, run the grid, and write the page."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import icegrt
from icegrt.config import StudyConfig
from icegrt.errors import RunError
from icegrt.study.checks import check
from icegrt.study.frozen import FROZEN_FILE, freeze, write_json
from icegrt.study.grid import Task, grid, input_files, pilot_tasks, preparation
from icegrt.study.page import write_page
from icegrt.study.results import Power, Results, collect, measure_problem, power_of
from icegrt.study.runner import LOG_FILE, Limits, lock_study, read_record, run_tasks
from icegrt.study.verdicts import power_sentence
from icegrt.utils import console

__all__ = ["Outcome", "run_study"]

POWER_FILE = "power.json"
_PACKAGES = ("torch", "megatron-core", "transformers", "scipy")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a study has come to: its page, its results, and whether every run that was to end has finished."""

    page: Path
    results: Results
    complete: bool


def run_study(config: StudyConfig) -> Outcome:
    """Run every part of a study that has not ended, and write its page.

    Raises:
        ConfigError: the study is wrong, or differs from the frozen one.
        RunError: the folder is in use, or a task of `prepare` failed.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the runs have stopped and the page is written.
    """
    check(config)
    files = input_files(config)
    tasks, pilot = grid(config, files), pilot_tasks(config, files)
    folder = Path(config.dir)
    if config.report_only and not (folder / FROZEN_FILE).is_file():
        raise RunError(f"{folder}: no study has begun there; leave out --report, or set study.dir")
    # A page may be written while the study goes on elsewhere.
    with contextlib.nullcontext(-1) if config.report_only else lock_study(folder) as lock:
        frozen = freeze(config, files, sum(read_record(task) is not None for task in tasks))
        complete = True
        try:
            if not config.report_only:
                complete = _Runs(config, lock).run_all(tasks, pilot, files)
        finally:
            results, power = collect(config, tasks, frozen["late"]), power_of(config, pilot)
            page = write_page(config, frozen, results, power, _versions_of([*pilot, *tasks]))
    return Outcome(page, results, complete and not results.failures)


class _Runs:
    """The tasks of a study on this machine."""

    def __init__(self, config: StudyConfig, lock: int) -> None:
        self._config, self._lock = config, lock
        self._limits = Limits(places(config), config.threads, config.time_limit_seconds)
        self._versions = versions()

    def run_all(self, tasks: Sequence[Task], pilot: Sequence[Task], files: dict[str, str]) -> bool:
        """Run preparation, pilot and grid. Return whether the pilot finished, if there is one."""
        config = self._config
        if pilot:
            self._prepare(preparation(config, files, config.pilot.seeds))
            self._run(pilot, "pilot")
            power = power_of(config, pilot)
            _state_power(Path(config.dir), power)
            if not power:
                log = pilot[0].folder / LOG_FILE
                console.warn(f"the pilot has failed, so the study does not go on: {log}; --retry-failed runs it again")
                return False
        if config.stop_after == "runs":
            self._prepare(preparation(config, files, config.seeds))
            self._run(tasks, "study")
        return True

    def _prepare(self, tasks: Sequence[Task]) -> None:
        # The time limit is one of runs.
        run_tasks(
            tasks,
            dataclasses.replace(self._limits, seconds=0.0),
            self._lock,
            label="prepare",
            versions=self._versions,
            retry_failed=True,
        )
        for task in tasks:
            record = read_record(task)
            if record is None or record["status"] == "failed":
                reason = "" if record is None else f": {record['reason']}"
                raise RunError(f"{task.name} failed{reason}; see {task.folder / LOG_FILE}, and start the study again")

    def _run(self, tasks: Sequence[Task], label: str) -> None:
        run_tasks(
            tasks,
            self._limits,
            self._lock,
            label=label,
            versions=self._versions,
            problem_of=lambda task: measure_problem(self._config, task),
            retry_failed=self._config.retry_failed,
        )


def places(config: StudyConfig) -> int:
    """Return the number of ranks that may run at a time: `parallel`, or one for each `threads` cores.

    On a machine with a GPU it is the number of ranks of the largest run: runs share no device.
    """
    if config.parallel:
        return config.parallel
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return max(setting.ranks for setting in config.settings)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // config.threads)


def versions() -> dict[str, str]:
    """Return the versions of Python, of icegrt with its commit, and of the packages that decide results."""
    found = {"python": platform.python_version(), "icegrt": icegrt.__version__}
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
        if commit.returncode == 0:
            found["commit"] = commit.stdout.strip() + (" with changes" if changed.stdout.strip() else "")
    except (OSError, subprocess.TimeoutExpired):
        pass  # an installed package without git
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _versions_of(tasks: Sequence[Task]) -> list[dict[str, str]]:
    """Return the different sets of versions in the records of the tasks."""
    different: list[dict[str, str]] = []
    for task in tasks:
        record = read_record(task)
        if record is not None and record["versions"] not in different:
            different.append(record["versions"])
    return different


def _state_power(folder: Path, power: Sequence[Power]) -> None:
    """Print what the seeds detect, and write it to power.json before the first run of the grid."""
    sentences = [power_sentence(p) for p in power]
    for text in sentences:
        console.print_info(text)
    if power:
        write_json(folder / POWER_FILE, {"sentences": sentences, "power": [dataclasses.asdict(p) for p in power]})
