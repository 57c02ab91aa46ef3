"""`icegrt study STUDY.yaml`: run settings and seeds, and compare them by contrasts that were written down before."""

from __future__ import annotations

import os

from icegrt.config import StudyConfig
from icegrt.errors import ConfigError
from icegrt.study.study import run_study
from icegrt.study.verdicts import sentence
from icegrt.utils import console

__all__ = ["run"]


def run(config: StudyConfig) -> int:
    """Run or continue a study. Return the exit status: 0, or 1 if a run failed.

    Raises:
        UserError: the study is wrong, or its folder is in use.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("leave torchrun out: icegrt study starts the ranks of its runs (study.settings[].ranks)")
    try:
        outcome = run_study(config)
    except KeyboardInterrupt:
        console.warn("the runs have stopped; the same command continues the study")
        raise
    results = outcome.results
    compared = sum(c.difference is not None for c in results.contrasts)
    if results.finished:
        for contrast in results.contrasts:
            console.print_info(sentence(contrast, compared))
    if results.failures:
        console.warn(f"{len(results.failures)} of {results.runs} runs failed; --retry-failed runs them again")
    console.print_info(f"page: {outcome.page}")
    return 0 if outcome.complete else 1
