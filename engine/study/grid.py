"""The runs of a study: one for each setting and seed, with its folder, its command and a fingerprint of both.

<study>/runs/<setting>/seed_3/   record.json, log.txt, and run/, the folder that the command writes
<study>/pilot/<setting>/seed_100/   the same
<study>/shared/, shared/seed_3/   the same, of `prepare`
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from icegrt.config import StudyConfig, StudySetting

__all__ = ["Task", "grid", "input_files", "pilot_tasks", "preparation"]

RUN_FOLDER = "run"


@dataclasses.dataclass(frozen=True)
class Task:
    """One process, or several ranks, that fill a folder.

    Attributes:
        name: for messages.
        folder: holds the record and the log; `out` is below it.
        command: words of the command.
        ranks: processes of the command.
        keeps_partial: whether an interrupted command continues in its folder, which is cleared otherwise.
        fingerprint: hash of the command, the ranks, the threads and the contents of the files that the study names.
        setting: name of the setting; empty for `prepare`.
        seed: of the run; -1 for a `prepare` without a seed.
    """

    name: str
    folder: Path
    command: tuple[str, ...]
    ranks: int
    keeps_partial: bool
    fingerprint: str
    setting: str = ""
    seed: int = -1

    @property
    def out(self) -> Path:
        """The folder that the command writes."""
        return self.folder / RUN_FOLDER


def input_files(config: StudyConfig) -> dict[str, str]:
    """Return the SHA-256 of each file that the study names: the recipe, and files in its commands and overrides.

    A file of an override may have a function after it, as in ppo.reward_function=reward.py:score.
    """
    base = config.base
    words = [base.recipe, *shlex.split(base.command), *shlex.split(base.prepare)]
    for override in [*base.overrides, *(word for setting in config.settings for word in setting.overrides)]:
        value = override.partition("=")[2]
        words += [value, value.rpartition(":")[0]]
    paths = sorted({word for word in words if word and Path(word).is_file()})
    return {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths}


def grid(config: StudyConfig, files: Mapping[str, str]) -> list[Task]:
    """Return the runs of the study, seed by seed, so that an unfinished study has complete pairs."""
    return [_run(config, files, setting, seed, "runs") for seed in config.seeds for setting in config.settings]


def pilot_tasks(config: StudyConfig, files: Mapping[str, str]) -> list[Task]:
    """Return the runs of the pilot."""
    settings = [setting for setting in config.settings if setting.name == config.pilot.setting]
    return [_run(config, files, setting, seed, "pilot") for setting in settings for seed in config.pilot.seeds]


def preparation(config: StudyConfig, files: Mapping[str, str], seeds: Iterable[int]) -> list[Task]:
    """Return the tasks of `prepare`: one, or one for each of `seeds`."""
    prepare = config.base.prepare
    if not prepare:
        return []
    tasks = []
    for seed in seeds if "{seed}" in prepare else [-1]:
        folder = _shared_folder(config, seed)
        values = {"shared": folder / RUN_FOLDER, "out": folder / RUN_FOLDER, "seed": seed, "setting": ""}
        command = tuple(_python(_filled(shlex.split(prepare), values), 1))
        fingerprint = _fingerprint(shlex.split(prepare), seed, 1, config.threads, files)
        name = "prepare" if seed < 0 else f"prepare, seed {seed}"
        tasks.append(Task(name, folder, command, 1, False, fingerprint, seed=seed))
    return tasks


def _run(config: StudyConfig, files: Mapping[str, str], setting: StudySetting, seed: int, part: str) -> Task:
    base = config.base
    folder = Path(config.dir).resolve() / part / setting.name.replace(" ", "_") / f"seed_{seed}"
    overrides = [*base.overrides, *setting.overrides]
    if base.recipe:
        own = [f"{base.stage}.run.dir={{out}}", f"{base.stage}.run.seed={{seed}}", f"{base.stage}.run.resume=auto"]
        words = ["python", "-m", "icegrt", base.stage, base.recipe, *overrides, *own]
    else:
        words = [*shlex.split(base.command), *overrides]
    shared = _shared_folder(config, seed if "{seed}" in base.prepare else -1) / RUN_FOLDER
    values = {"out": folder / RUN_FOLDER, "seed": seed, "setting": setting.name, "shared": shared}
    command = tuple(_python(_filled(words, values), setting.ranks))
    name = f"{setting.name}, seed {seed}" + (" (pilot)" if part == "pilot" else "")
    fingerprint = _fingerprint([*words, base.prepare], seed, setting.ranks, config.threads, files)
    keeps_partial = bool(base.recipe) or base.resumes
    return Task(name, folder, command, setting.ranks, keeps_partial, fingerprint, setting.name, seed)


def _shared_folder(config: StudyConfig, seed: int) -> Path:
    folder = Path(config.dir).resolve() / "shared"
    return folder if seed < 0 else folder / f"seed_{seed}"


def _filled(words: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    filled = list(words)
    for name, value in values.items():
        filled = [word.replace(f"{{{name}}}", str(value)) for word in filled]
    return filled


def _python(words: Sequence[str], ranks: int) -> list[str]:
    """Return the words with this interpreter in the place of `python`, and with torchrun for several ranks."""
    if words[0] not in ("python", "python3"):
        return list(words)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, *words[1:]]


def _fingerprint(words: Sequence[str], seed: int, ranks: int, threads: int, files: Mapping[str, str]) -> str:
    document = json.dumps([list(words), seed, ranks, threads, dict(files)])
    return hashlib.sha256(document.encode()).hexdigest()[:16]
