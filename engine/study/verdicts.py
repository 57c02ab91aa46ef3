"""The sentence of each contrast, from a small fixed set, and the statement of power."""

from __future__ import annotations

from typing import TYPE_CHECKING

from icegrt.config import StudyContrast
from icegrt.report.text import interval, number, signed
from icegrt.study.statistics import ALPHA, PairedDifference

if TYPE_CHECKING:
    from icegrt.study.results import ContrastResult, Power

__all__ = ["OUTCOMES", "outcome_of", "power_sentence", "sentence"]

# Outcome -> its sentence. `figures` are the difference, its interval and the number of seeds.
OUTCOMES = {
    "as expected": "As expected, {a} has {direction} {measure} than {b}: {figures}.",
    "opposite": "The expectation failed: {a} has {direction} {measure} than {b}, not {expected}: {figures}.",
    "not shown": "The expectation was not confirmed: {a} and {b} do not differ measurably in {measure}: {figures}.",
    "equal": "As expected, {a} and {b} differ in {measure} by less than {margin}: {figures}.",
    "not equal": "The expectation failed: {a} has {direction} {measure} than {b}, by more than {margin}: {figures}.",
    "undecided": "Undecided: {a} and {b} may differ in {measure} by more than {margin}: {figures}.",
    "not measured": "Not measured: {pairs} finished runs of both {a} and {b}, and an interval needs two.",
}


def outcome_of(contrast: StudyContrast, difference: PairedDifference | None) -> str:
    """Return the outcome of a contrast: a key of OUTCOMES.

    A difference counts if its interval excludes 0. Equality counts if the interval lies within ± margin; it has failed
    if the interval lies outside.
    """
    if difference is None:
        return "not measured"
    low, high = difference.low, difference.high
    if contrast.expected == "equal":
        if -contrast.margin < low and high < contrast.margin:
            return "equal"
        return "not equal" if low > contrast.margin or high < -contrast.margin else "undecided"
    if low <= 0 <= high:
        return "not shown"
    return "as expected" if (low > 0) == (contrast.expected == "higher") else "opposite"


def sentence(result: ContrastResult, contrasts: int) -> str:
    """Return the plain sentence of a contrast, with notes on several contrasts and on a late registration.

    Args:
        result: the contrast.
        contrasts: number of contrasts that have a difference.
    """
    contrast, difference = result.contrast, result.difference
    n = len(result.seeds)
    text = OUTCOMES[result.outcome].format(
        a=contrast.a,
        b=contrast.b,
        measure=result.label,
        expected=f"a {contrast.expected} one",
        margin=number(contrast.margin),
        direction="" if difference is None else "a higher" if difference.mean > 0 else "a lower",
        figures="" if difference is None else f"{_figures(difference)}, {n} seeds",
        pairs="one seed has" if n else "no seed has",
    )
    notes = []
    if result.outcome in ("as expected", "opposite") and result.holm_p is not None and result.holm_p > ALPHA:
        notes.append(f"It does not hold after Holm's correction for {contrasts} contrasts.")
    if result.late is not None:
        notes.append(f"The contrast was written down or changed after {result.late} runs had finished.")
    return " ".join([text, *notes])


def _figures(difference: PairedDifference) -> str:
    return f"{signed(difference.mean)} ({interval([difference.low, difference.high])})"


def power_sentence(power: Power) -> str:
    """Return what the seeds detect of one measure, in words."""
    values = ", ".join(number(value) for value in power.values.values())
    head = f"{power.measure}: {len(power.values)} runs of {power.setting} gave {values}."
    if power.std == 0:
        return f"{head} They do not differ, so there is no statement of power."
    return (
        f"{head} Their standard deviation is {number(power.std)} (95% CI {number(power.std_low)} to "
        f"{number(power.std_high)}). Over {power.seeds} paired seeds a true difference of {number(power.difference)} "
        f"is detected with 80% probability at the 5% level ({number(power.difference_low)} to "
        f"{number(power.difference_high)} at the ends of that interval), if runs of one seed are not correlated. If "
        f"nothing differs, a margin of {number(power.margin)} shows equality with 80% probability."
    )
