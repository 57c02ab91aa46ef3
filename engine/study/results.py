"""The results of a study: values of each setting over seeds, curves, contrasts with intervals, and power."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from icegrt.config import StudyConfig, StudyContrast, StudyMeasure
from icegrt.study.grid import Task
from icegrt.study.measures import MeasureError, is_curve, read_curve, read_value
from icegrt.study.runner import read_record
from icegrt.study.statistics import (
    PairedDifference,
    detectable_difference,
    equivalence_margin,
    holm,
    paired_difference,
    std_interval,
)
from icegrt.study.verdicts import outcome_of

__all__ = ["ContrastResult", "Failure", "Power", "Results", "collect", "measure_problem", "power_of"]

Curve = list[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Failure:
    """A run that ended without its measures."""

    setting: str
    seed: int
    reason: str
    log_tail: list[str]


@dataclasses.dataclass(frozen=True)
class ContrastResult:
    """A contrast with its result.

    Attributes:
        contrast: what was frozen.
        measure: name of its measure.
        seeds: seeds with finished runs of both settings.
        difference: a - b over these seeds; None for fewer than two.
        holm_p: p-value adjusted for all contrasts that have a difference.
        outcome: one of `verdicts.OUTCOMES`.
        late: number of runs that had finished when it was added or changed; None if it was frozen before the first.
        unit: of the measure; empty if it has none.
    """

    contrast: StudyContrast
    measure: str
    seeds: list[int]
    difference: PairedDifference | None
    holm_p: float | None
    outcome: str
    late: int | None
    unit: str = ""

    @property
    def label(self) -> str:
        """The measure with its unit."""
        return f"{self.measure} ({self.unit})" if self.unit else self.measure


@dataclasses.dataclass(frozen=True)
class Power:
    """What the seeds of the study can detect of one measure, by the standard deviation in the pilot.

    Attributes:
        measure: its name.
        setting: setting of the pilot.
        values: by seed.
        seeds: number of seeds of the study.
        std: standard deviation between the pilot's seeds.
        std_low: lower end of its 95% interval.
        std_high: upper end.
        difference: what a contrast detects with 80% at the 5% level, without correlation within a seed.
        difference_low: the same at `std_low`.
        difference_high: the same at `std_high`.
        margin: smallest margin that shows equality with 80%, if nothing differs.
    """

    measure: str
    setting: str
    values: dict[int, float]
    seeds: int
    std: float
    std_low: float
    std_high: float
    difference: float
    difference_low: float
    difference_high: float
    margin: float


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything that the page shows of the runs.

    Attributes:
        runs: number of runs of the grid.
        finished: number of finished ones.
        failures: the failed ones.
        values: measure -> setting -> seed -> value.
        curves: measure -> setting -> curves of its seeds, of measures that have rows.
        seconds: setting -> seconds of its finished runs.
        contrasts: in their order.
    """

    runs: int
    finished: int
    failures: list[Failure]
    values: dict[str, dict[str, dict[int, float]]]
    curves: dict[str, dict[str, list[Curve]]]
    seconds: dict[str, list[float]]
    contrasts: list[ContrastResult]


def measure_problem(config: StudyConfig, task: Task) -> str:
    """Return why a run that exited with status 0 lacks a measure; an empty text if it has all."""
    for measure in config.measures:
        try:
            read_value(task.out, measure)
        except MeasureError as error:
            return f"measure {measure.name}: {error}"
    return ""


def collect(config: StudyConfig, tasks: Sequence[Task], late: Mapping[str, int]) -> Results:
    """Read the runs that have ended, and compute every contrast.

    Args:
        config: the study.
        tasks: the runs of the grid.
        late: see `frozen.freeze`.
    """
    values: dict[str, dict[str, dict[int, float]]] = {
        measure.name: {setting.name: {} for setting in config.settings} for measure in config.measures
    }
    curves: dict[str, dict[str, list[Curve]]] = {m.name: {} for m in config.measures if is_curve(m)}
    seconds: dict[str, list[float]] = {setting.name: [] for setting in config.settings}
    failures, finished = [], 0
    for task in tasks:
        record = read_record(task)
        if record is None:
            continue
        # An amended study may have measures that a finished run lacks.
        reason = record["reason"] or measure_problem(config, task)
        if reason:
            failures.append(Failure(task.setting, task.seed, reason, record["log_tail"]))
            continue
        finished += 1
        seconds[task.setting].append(record["seconds"])
        for measure in config.measures:
            values[measure.name][task.setting][task.seed] = read_value(task.out, measure)
            if is_curve(measure):
                curves[measure.name].setdefault(task.setting, []).append(read_curve(task.out, measure))
    contrasts = _contrasts(config, values, late)
    return Results(len(tasks), finished, failures, values, curves, seconds, contrasts)


def _contrasts(
    config: StudyConfig, values: Mapping[str, Mapping[str, Mapping[int, float]]], late: Mapping[str, int]
) -> list[ContrastResult]:
    pairs, units = [], {measure.name: measure.unit for measure in config.measures}
    for contrast in config.contrasts:
        measure = contrast.measure or config.measures[0].name
        a, b = values[measure][contrast.a], values[measure][contrast.b]
        seeds = [seed for seed in config.seeds if seed in a and seed in b]
        difference = paired_difference([a[s] for s in seeds], [b[s] for s in seeds]) if len(seeds) > 1 else None
        pairs.append((contrast, measure, seeds, difference))
    adjusted = iter(holm([difference.p_value for *_, difference in pairs if difference is not None]))
    return [
        ContrastResult(
            contrast,
            measure,
            seeds,
            difference,
            None if difference is None else next(adjusted),
            outcome_of(contrast, difference),
            late.get(contrast.name),
            units[measure],
        )
        for contrast, measure, seeds, difference in pairs
    ]


def power_of(config: StudyConfig, pilot: Sequence[Task]) -> list[Power]:
    """Return what the study's seeds detect of each measure; nothing for fewer than two finished runs of the pilot.

    The standard deviation of a paired difference is that of one run times sqrt(2): as if runs of one seed had no
    correlation, since the pilot has one setting.
    """
    finished = [task for task in pilot if (record := read_record(task)) and record["status"] == "finished"]
    finished = [task for task in finished if not measure_problem(config, task)]
    if len(finished) < 2:
        return []
    return [
        _power(config, measure, {t.seed: read_value(t.out, measure) for t in finished}) for measure in config.measures
    ]


def _power(config: StudyConfig, measure: StudyMeasure, values: dict[int, float]) -> Power:
    mean = sum(values.values()) / len(values)
    std = math.sqrt(sum((value - mean) ** 2 for value in values.values()) / (len(values) - 1))
    low, high = std_interval(std, len(values))
    n, per_std = len(config.seeds), math.sqrt(2) * detectable_difference(1.0, len(config.seeds))
    return Power(
        measure=measure.name,
        setting=config.pilot.setting,
        values=values,
        seeds=n,
        std=std,
        std_low=low,
        std_high=high,
        difference=per_std * std,
        difference_low=per_std * low,
        difference_high=per_std * high,
        margin=equivalence_margin(math.sqrt(2) * std, n) if std > 0 else 0.0,
    )
