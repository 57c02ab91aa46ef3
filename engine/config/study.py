"""Configuration keys of `icegrt study`: settings and seeds over a base run, measures, and contrasts."""

from __future__ import annotations

from typing import Literal

from icegrt.config.base import Loadable, Section, SectionList, config_class, key


@config_class
class StudyBase:
    """The run that every setting changes: a command, or one command of a recipe."""

    command: str = key(
        "",
        "command line of a run, as in `python run.py --out {out} --seed {seed}`; placeholders: {out} (the run's "
        "folder), {seed}, {setting}, {shared} (the folder of `prepare`); `python` is the interpreter of the study; "
        "overrides of the base and the setting are appended as words",
    )
    recipe: str = key(
        "",
        "recipe file, instead of a command: icegrt runs `stage` with it, with the folder and the seed of each run; "
        "overrides may contain the placeholders",
    )
    stage: Literal["sft", "reward", "value", "ppo"] = key("ppo", "the command that runs a recipe")
    overrides: list[str] = key([], "overrides of all settings, as in ppo.kl_coef=0.1")
    prepare: str = key(
        "",
        "command line that runs once before all runs, into the empty folder {shared}; once for each seed if it has "
        "{seed}",
    )
    resumes: bool = key(
        False, "a command continues a run that was stopped, in the same folder; otherwise the folder is cleared first"
    )


@config_class
class StudySetting:
    """One setting of the grid."""

    name: str = key("", "name of the setting, for folders and tables")
    overrides: list[str] = key([], "what this setting changes: words after the overrides of the base")
    ranks: int = key(1, "processes of a run, started by torchrun if more than one", ge=1)


@config_class
class StudyMeasure:
    """A number of each finished run."""

    name: str = key("", "name of the measure, for contrasts and tables")
    file: str = key("metrics.jsonl", "file below the run's folder: rows of JSON (.jsonl) or one JSON object")
    field: str = key(
        "",
        "field of a row or of the object, dotted: `evaluation.function_score_mean`; the evaluation before training is "
        "one of these rows, too",
    )
    last: int = key(1, "with rows: mean over the last this many that have the field (1: the final one)", ge=1)
    unit: str = key("", "unit, for the axis")


@config_class
class StudyContrast:
    """A difference between two settings, with its expectation: `a` minus `b`."""

    name: str = key("", "name of the contrast")
    a: str = key("", "setting")
    b: str = key("", "setting that is subtracted")
    measure: str = key("", "measure; empty: the first one")
    expected: Literal["higher", "lower", "equal"] = key("higher", "expectation about `a`, compared with `b`")
    margin: float = key(0.0, "with expected=equal: the largest difference that counts as none", ge=0)


@config_class
class StudyPilot:
    """A few runs of one setting before all others: they estimate the standard deviation between seeds."""

    setting: str = key("", "setting; empty: no pilot, and no statement of power")
    seeds: list[int] = key([], "seeds, at least two, none of which is a seed of the study")


@config_class
class StudyConfig(Loadable):
    """A study: settings and seeds over one base run, with contrasts that are frozen before the first run."""

    section = "study"
    title: str = key("", "title of the page")
    question: str = key("", "what the study is to find out, in a sentence or two, for the page")
    dir: str = key("runs/study", "folder of the study")
    page: str = key("", "Markdown file that gets the page, too, with its pictures beside it, as in docs/studies/kl.md")
    base: Section[StudyBase] = key(StudyBase(), "the run that settings change")
    settings: SectionList[StudySetting] = key([], "the settings")
    seeds: list[int] = key([0, 1, 2, 3, 4], "seeds of every setting")
    measures: SectionList[StudyMeasure] = key([], "the measures")
    contrasts: SectionList[StudyContrast] = key([], "the contrasts")
    pilot: Section[StudyPilot] = key(StudyPilot(), "the pilot")
    time_limit_seconds: float = key(0.0, "a run that takes longer is stopped and has failed; 0: no limit", ge=0)
    threads: int = key(1, "threads of each rank (OMP_NUM_THREADS)", ge=1)
    parallel: int = key(
        0,
        "ranks at a time: runs go side by side, a run of several ranks counts as several; 0: one for each `threads` "
        "cores, without a GPU",
        ge=0,
    )
    stop_after: Literal["pilot", "runs"] = key("runs", "end after the pilot, or after all runs")
    report_only: bool = key(False, "start no run, write the page from the finished ones (--report)")
    retry_failed: bool = key(False, "run failed runs again (--retry-failed)")
    amend: bool = key(
        False, "accept a study that differs from the frozen one; the page then lists what changed, and when (--amend)"
    )
