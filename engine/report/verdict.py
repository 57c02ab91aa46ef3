"""The verdict of a PPO report: the change of the task score, gaming of the reward model, and warnings.

A change is significant if its 95% interval excludes zero. Without an interval the verdict states the sign, and that it
may be noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from icegrt.metrics.alarms import KL_TARGET_MULTIPLE
from icegrt.report.text import arrow, interval, number, percent, signed

__all__ = ["Change", "Verdict", "change_of", "verdict"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The conclusion of a report. `level` is good, bad, warn or neutral; `sentences` have the figures."""

    level: str
    headline: str
    sentences: list[str]
    warnings: list[str]


@dataclasses.dataclass(frozen=True)
class Change:
    """A figure before and after PPO. direction: 1 up, -1 down, 0 not significant, None unknown."""

    before: float | None
    after: float | None
    ci95: list[float] | None
    direction: int | None

    @property
    def has_interval(self) -> bool:
        """Whether the change has a confidence interval."""
        return self.ci95 is not None

    @property
    def gain(self) -> float | None:
        """The difference, if both figures are known."""
        return None if self.before is None or self.after is None else self.after - self.before

    def text(self) -> str:
        """Return `0.690 -> 0.729 (+0.039, 95% CI +0.021 to +0.055)`."""
        details = [part for part in (signed(self.gain) if self.gain is not None else "", interval(self.ci95)) if part]
        return arrow(self.before, self.after) + (f" ({', '.join(details)})" if details else "")


def change_of(ppo: Mapping[str, Any], name: str) -> Change:
    """Return the change from `<name>_before` to `<name>_after`, with `<name>_gain_ci95` if it is known."""
    before, after, ci95 = (ppo.get(f"{name}_{end}") for end in ("before", "after", "gain_ci95"))
    if ci95 is not None:
        direction = 1 if ci95[0] > 0 else -1 if ci95[1] < 0 else 0
    elif before is None or after is None:
        direction = None
    else:
        direction = (after > before) - (after < before)
    return Change(before, after, ci95, direction)


def score_name(ppo: Mapping[str, Any]) -> str:
    """Return the name of the score in the figures `heldout_reward_*`: reward-model score or total score."""
    return ppo.get("heldout_reward_name") or "reward-model score"


def verdict(report: Mapping[str, Any]) -> Verdict:
    """Return the verdict of a validated report (see `page.validated`)."""
    ppo = report.get("ppo") or {}
    task, greedy = change_of(ppo, "task_score"), change_of(ppo, "greedy_task_score")
    score, name = change_of(ppo, "heldout_reward"), score_name(ppo)
    level, headline = _headline(task, greedy, score, name)
    sentences = [
        f"{label} {change.text()}."
        for label, change in (("Task score", task), ("Greedy", greedy), (name.capitalize(), score))
        if change.direction is not None
    ]
    kl, target = ppo.get("kl_nats_per_response"), ppo.get("kl_target_nats_per_response")
    if kl is not None:
        target_text = "" if target is None else f" (target {target:g})"
        sentences.append(f"KL {number(kl, 2)} nats per response{target_text}.")
    warnings = [*_conflicts(task, greedy, score, name, level), *_drift(ppo), *_reward_model(report)]
    if level == "good" and warnings:
        level = "warn" if any("KL" in w or "greedy" in w for w in warnings) else level
    return Verdict(level, headline, sentences, warnings)


def _headline(task: Change, greedy: Change, score: Change, score_name: str) -> tuple[str, str]:
    main = task if task.direction is not None else greedy
    fallen = next((c for c in (task, greedy) if c.direction == -1), None)
    if score.direction == 1 and fallen is not None and (fallen is task or task.direction != 1):
        name = "task score" if fallen is task else "task score of greedy answers"
        if score.has_interval and fallen.has_interval:
            return "bad", f"PPO gamed the reward model: the {score_name} rose while the {name} fell."
        return "bad", f"The {score_name} rose while the {name} fell: PPO may be gaming the reward model."
    if main.direction is None:
        change = {1: "rose", -1: "fell", 0: "did not change"}.get(score.direction, "was not measured either")
        return (
            "neutral",
            f"The task score was not measured. The {score_name} {change}; it alone does not show if answers got "
            "better.",
        )
    if not main.has_interval:
        change = {1: "rose", -1: "fell", 0: "did not change"}[main.direction]
        return "neutral", f"The task score {change}; without an interval this may be noise."
    return {
        1: ("good", "PPO raised the task score."),
        -1: ("bad", "PPO lowered the task score."),
        0: ("neutral", "PPO made no measurable difference to the task score."),
    }[main.direction]


def _conflicts(task: Change, greedy: Change, score: Change, score_name: str, level: str) -> list[str]:
    warnings = []
    if task.direction == 1 and greedy.direction == -1:
        warnings.append(f"The task score of greedy answers fell: {greedy.text()}.")
    if level != "bad" and task.direction == 0 and score.direction == 1 and task.has_interval:
        warnings.append(
            f"The {score_name} rose without a measurable gain in the task score: check if PPO games the reward model."
        )
    if task.direction == 1 and score.direction == -1:
        warnings.append(f"The {score_name} fell while the task score rose: the two disagree.")
    return warnings


def _drift(ppo: Mapping[str, Any]) -> list[str]:
    warnings = []
    kl, target = ppo.get("kl_nats_per_response"), ppo.get("kl_target_nats_per_response")
    if kl is not None and target is not None and kl > KL_TARGET_MULTIPLE * target:
        warnings.append(
            f"KL from the reference is {number(kl, 2)} nats per response, over twice its target of {target:g}."
        )
    truncated = ppo.get("truncated_fraction_after")
    if truncated is not None and truncated > 0.2:
        warnings.append(f"{percent(truncated)} of the answers are truncated.")
    before, after = ppo.get("distinct_fraction_before"), ppo.get("distinct_fraction_after")
    if before is not None and after is not None and after < 0.5 * before:
        warnings.append(f"Answers became alike: {percent(before)} of them were distinct, now {percent(after)}.")
    return warnings


def _reward_model(report: Mapping[str, Any]) -> list[str]:
    reward = report.get("reward") or {}
    accuracy, baseline = reward.get("heldout_accuracy"), reward.get("baseline_accuracy")
    if accuracy is None or baseline is None or accuracy > baseline:
        return []
    return [
        f"The reward model ({percent(accuracy)} of pairs) is no better than one feature alone, "
        f"{reward.get('baseline_feature') or 'unnamed'} ({percent(baseline)})."
    ]
