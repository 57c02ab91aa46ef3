"""`icegrt report RUN`: write the report of a run that is going on, has ended, or has failed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from icegrt.errors import ConfigError, RunError
from icegrt.report.page import write_run_report
from icegrt.utils import console

USAGE = "usage: icegrt report RUN\n\nWrites report.html and curves.png of the run in the folder RUN from its metrics."


def main(arguments: Sequence[str]) -> None:
    """Run `icegrt report` with `arguments`.

    Raises:
        ConfigError: there is not exactly one folder.
        RunError: the folder does not exist, has no metrics yet, or cannot be written.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        print(USAGE)
        return
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ConfigError(f"icegrt report: expected the folder of one run, got {' '.join(arguments) or 'nothing'}")
    run_dir = Path(arguments[0])
    if not run_dir.is_dir():
        raise RunError(f"{run_dir}: no such folder; name the run.dir of a run")
    try:
        page = write_run_report(run_dir)
    except OSError as error:
        raise RunError(f"{run_dir}: the report cannot be written ({error.strerror or error})") from error
    console.print_info(f"report: {page}")
