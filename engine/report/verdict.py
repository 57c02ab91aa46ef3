"""What a PPO report concludes: did the task score rise, was the reward model gamed, what is worth a warning.

A change counts when its 95% interval leaves zero out. Without an interval the sign is told, and that it is not sure.
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
    """level: good, bad, warn or neutral; a headline; sentences with the figures; warnings."""

    level: str
    headline: str
    sentences: list[str]
    warnings: list[str]


@dataclasses.dataclass(frozen=True)
class Change:
    """A figure before and after. direction: 1 up, -1 down, 0 within the noise, None unknown; sure: has an interval."""

    before: float | None
    after: float | None
    ci95: list[float] | None
    direction: int | None

    @property
    def sure(self) -> bool:
        return self.ci95 is not None

    @property
    def gain(self) -> float | None:
        return None if self.before is None or self.after is None else self.after - self.before

    def words(self) -> str:
        """`0.690 -> 0.729 (+0.039, 95% CI +0.021 to +0.055)`."""
        inside = [part for part in (signed(self.gain) if self.gain is not None else "", interval(self.ci95)) if part]
        return arrow(self.before, self.after) + (f" ({', '.join(inside)})" if inside else "")


def change_of(ppo: Mapping[str, Any], name: str) -> Change:
    """The change of `<name>_before` to `<name>_after`, with `<name>_gain_ci95` where there is one."""
    before, after, ci95 = (ppo.get(f"{name}_{end}") for end in ("before", "after", "gain_ci95"))
    if ci95 is not None:
        direction = 1 if ci95[0] > 0 else -1 if ci95[1] < 0 else 0
    elif before is None or after is None:
        direction = None
    else:
        direction = (after > before) - (after < before)
    return Change(before, after, ci95, direction)


def verdict(report: Mapping[str, Any]) -> Verdict:
    """The conclusion of a validated report (see `report.write_ppo_report`)."""
    ppo = report.get("ppo") or {}
    task, greedy = change_of(ppo, "task_score"), change_of(ppo, "greedy_task_score")
    reward = change_of(ppo, "heldout_reward")
    level, headline = _headline(task, greedy, reward)
    sentences = [
        f"{label} {change.words()}."
        for label, change in (("Task score", task), ("Greedy", greedy), ("Reward", reward))
        if change.direction is not None
    ]
    kl, target = ppo.get("kl_nats_per_response"), ppo.get("kl_target_nats_per_response")
    if kl is not None:
        against = "" if target is None else f" (target {target:g})"
        sentences.append(f"KL {number(kl, 2)} nats per response{against}.")
    warnings = [*_changes_worth_a_warning(task, greedy, reward, level), *_drift(ppo), *_reward_model(report)]
    if level == "good" and warnings:
        level = "warn" if any("KL" in w or "greedy" in w for w in warnings) else level
    return Verdict(level, headline, sentences, warnings)


def _headline(task: Change, greedy: Change, reward: Change) -> tuple[str, str]:
    judged = task if task.direction is not None else greedy
    fell = next((c for c in (task, greedy) if c.direction == -1), None)
    if reward.direction == 1 and fell is not None and (fell is task or task.direction != 1):
        which = "task score" if fell is task else "task score of greedy answers"
        if reward.sure and fell.sure:
            return "bad", f"PPO gamed the reward model: the reward rose while the {which} fell."
        return "bad", f"The reward rose while the {which} fell: PPO may be gaming the reward model."
    if judged.direction is None:
        rose = {1: "The reward rose, but a", -1: "The reward fell, and a", 0: "The reward did not move, and a"}
        start = rose.get(reward.direction, "The reward was not measured either; a")
        return (
            "neutral",
            f"The task score was not measured. {start} reward alone does not tell whether answers got better.",
        )
    if not judged.sure:
        word = {1: "rose", -1: "fell", 0: "did not move"}[judged.direction]
        return "neutral", f"The task score {word}; without an interval it is not sure that this is more than noise."
    return {
        1: ("good", "PPO raised the task score."),
        -1: ("bad", "PPO lowered the task score."),
        0: ("neutral", "PPO made no measurable difference to the task score."),
    }[judged.direction]


def _changes_worth_a_warning(task: Change, greedy: Change, reward: Change, level: str) -> list[str]:
    found = []
    if task.direction == 1 and greedy.direction == -1:
        found.append(f"The task score of greedy answers fell: {greedy.words()}.")
    if level != "bad" and task.direction == 0 and reward.direction == 1 and task.sure:
        found.append(
            "The reward rose without a measurable gain in the task score: watch for gaming of the reward model."
        )
    if task.direction == 1 and reward.direction == -1:
        found.append("The reward fell while the task score rose: the two do not agree.")
    return found


def _drift(ppo: Mapping[str, Any]) -> list[str]:
    found = []
    kl, target = ppo.get("kl_nats_per_response"), ppo.get("kl_target_nats_per_response")
    if kl is not None and target is not None and kl > KL_TARGET_MULTIPLE * target:
        found.append(
            f"KL from the reference is {number(kl, 2)} nats per response, over twice its target of {target:g}."
        )
    truncated = ppo.get("truncated_fraction_after")
    if truncated is not None and truncated > 0.2:
        found.append(f"{percent(truncated)} of the answers are truncated.")
    before, after = ppo.get("distinct_fraction_before"), ppo.get("distinct_fraction_after")
    if before is not None and after is not None and after < 0.5 * before:
        found.append(f"Answers became alike: {percent(before)} of them were distinct, now {percent(after)}.")
    return found


def _reward_model(report: Mapping[str, Any]) -> list[str]:
    reward = report.get("reward") or {}
    accuracy, baseline = reward.get("heldout_accuracy"), reward.get("baseline_accuracy")
    if accuracy is None or baseline is None or accuracy > baseline:
        return []
    return [
        f"The reward model ({percent(accuracy)} of pairs) is no better than one feature alone, "
        f"{reward.get('baseline_feature') or 'unnamed'} ({percent(baseline)})."
    ]
