"""An example as a sequence of stages. The same command resumes it after the last finished stage."""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from icegrt import PPOTrainer
from icegrt.distributed import failure
from icegrt.errors import UserError
from icegrt.utils.console import is_main, print_info
from icegrt.utils.cpu import bf16_slowdown
from icegrt.utils.files import write_text_atomic
from icegrt.utils.text import duration
from staged_run.launch import launch, ranks

__all__ = ["StagedRun", "main"]

DTYPE_FILE = "dtype.txt"  # below the data


class StagedRun:
    """A run in the folder `out`. A subclass lists its stages and has one method for each.

    A finished stage has a file with its seconds. Rank 0 writes it, and every rank waits for it before the next stage.

    Attributes:
        STAGES: names of the methods, in order.
        RANK_0_STAGES: stages that rank 0 runs alone.
        SECTIONS: sections of the configuration that overrides may change.
        MAX_RANKS: most ranks that are started on a CPU.
    """

    STAGES: ClassVar[tuple[str, ...]]
    RANK_0_STAGES: ClassVar[tuple[str, ...]]
    SECTIONS: ClassVar[tuple[str, ...]]
    MAX_RANKS: ClassVar[int] = 4

    def __init__(self, out: Path, seed: int, overrides: list[str], **options: str) -> None:
        self.out, self.seed, self.overrides, self.options = out, seed, overrides, options
        self.data = out / "data"
        out.mkdir(parents=True, exist_ok=True)
        if is_main():
            self._check_same_settings()

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the example's own options; `self.options` has their values."""

    def run(self) -> None:
        """Run all stages that are not finished."""
        before: list[str] = []
        for number, name in enumerate(self.STAGES, 1):
            finished = self.out / "stages" / f"{name}.json"
            if finished.is_file():
                print_info(f"[{number}/{len(self.STAGES)}] {name}: finished before")
                before.append(name)
                continue
            print_info(f"[{number}/{len(self.STAGES)}] {name}")
            started = time.perf_counter()
            if is_main() or name not in self.RANK_0_STAGES:
                with self._explain_missing_files(name, before):
                    getattr(self, name)()
            seconds = time.perf_counter() - started
            if is_main():
                finished.parent.mkdir(exist_ok=True)
                write_text_atomic(finished, json.dumps({"seconds": seconds}) + "\n")
            while not finished.is_file():
                time.sleep(0.05)
            print_info(f"    {name} took {duration(seconds)}")

    def run_overrides(self, section: str) -> list[str]:
        """Return the overrides of a training stage: its folder below `out`, the seed, and those of the command line."""
        return [
            f"{section}.run.dir={self.out / section}",
            f"{section}.run.seed={self.seed}",
            f"{section}.run.resume=auto",
            *self.overrides_of(section),
        ]

    def choose_dtype(self) -> None:
        """Write bf16 or fp32 to a file of the run, so that a resumed run has the same.

        bf16 on a GPU, and on a CPU whose matrix products are faster in it.
        """
        is_bf16 = torch.cuda.is_available() or bf16_slowdown() < 1
        write_text_atomic(self.data / DTYPE_FILE, "bf16" if is_bf16 else "fp32")

    def dtype(self, of_older_versions: str) -> str:
        """Return the type that `choose_dtype` wrote, or `of_older_versions` if an older version prepared the run."""
        path = self.data / DTYPE_FILE
        return path.read_text(encoding="utf-8") if path.is_file() else of_older_versions

    def overrides_of(self, section: str) -> list[str]:
        """Return the overrides of one section that the command line gave."""
        return [override for override in self.overrides if override.startswith(f"{section}.")]

    def assess(self, trainer: PPOTrainer, when: str, measure: Callable[[PPOTrainer, Path], Any]) -> None:
        """Write `measure(trainer, self.data)` to assessment_<when>.json, unless the file is there. Collective."""
        path = self.out / f"assessment_{when}.json"
        if path.is_file():
            return
        document = measure(trainer, self.data)
        if is_main():
            write_text_atomic(path, json.dumps(document))

    @contextlib.contextmanager
    def _explain_missing_files(self, stage: str, before: Sequence[str]) -> Iterator[None]:
        """Raise `UserError` if `stage` lacks a file of the run, and the stages `before` finished earlier."""
        try:
            yield
        except FileNotFoundError as error:
            path = Path(error.filename or "")
            if not before or self.out.resolve() not in path.resolve().parents:
                raise
            raise UserError(
                f"stage {stage}: {path} is missing, and stages finished before: {', '.join(before)}. Another version "
                f"of the example may not have written it. Delete the JSON file of the stage that writes it in "
                f"{self.out / 'stages'} to repeat that stage, or choose another --out"
            ) from error

    def _check_same_settings(self) -> None:
        path = self.out / "demo.json"
        settings = {"seed": self.seed, **self.options, "overrides": self.overrides}
        if path.is_file():
            if json.loads(path.read_text(encoding="utf-8")) != settings:
                raise UserError(f"{self.out}: holds a demo with other settings; choose another --out or delete it")
        elif any(self.out.iterdir()):
            raise UserError(f"{self.out}: not empty, and not a demo's folder; choose another --out")
        else:
            path.write_text(json.dumps(settings) + "\n", encoding="utf-8")


def main(kind: type[StagedRun], description: str, out: str) -> int:
    """Parse the command line of an example and run it, with one rank per core. Return the exit status.

    Args:
        kind: the example.
        description: the help text.
        out: default of `--out`; the environment variable OUT replaces it.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", out)), help="folder of the run")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, sampling and training")
    parser.add_argument("overrides", nargs="*", help=f"settings, as in {kind.SECTIONS[-1]}.kl_coef=0.1")
    kind.add_arguments(parser)
    arguments = parser.parse_args()
    unknown = [o for o in arguments.overrides if o.split(".")[0] not in kind.SECTIONS or "=" not in o]
    if unknown:
        sections = " or ".join(kind.SECTIONS)
        parser.error(f"expected SECTION.KEY=VALUE with a section of {sections}, got {unknown[0]!r}")
    try:
        count = ranks(kind.MAX_RANKS)
        if count > 1:
            return launch([sys.executable, *sys.argv], count)
        with failure.exit_on_peer_failure():
            kind(**vars(arguments)).run()
    except UserError as error:
        if failure.should_report(error):
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if is_main():
            print("\ninterrupted; the same command resumes the demo", file=sys.stderr)
        return 130
    return 0
