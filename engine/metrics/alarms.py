"""Alarms on the metrics of PPO. Each message has the figure, the threshold and a remedy.

The most important alarm: the reward-model score rises while the task score falls. An alarm whose condition lasts is
repeated every `REPEAT_ITERATIONS`. The state consists of plain JSON types and is part of the checkpoint, so that a
resumed run raises the same alarms as an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from icegrt.config import PPOConfig
from icegrt.metrics.records import Evaluation, PPOStep

__all__ = ["Alarms", "trend"]

REPEAT_ITERATIONS = 10
# Two series disagree if their trends (slope over standard error) exceed TREND_T with opposite signs, over the last MIN
# to MAX points. In a simulation of 24 iterations, the alarm is raised for pure noise in 1.5% of the runs, and for a
# fall by a quarter of the noise per iteration in 98%, for half of them by iteration 13.
TREND_T = 3.5
MIN_ITERATIONS, MAX_ITERATIONS = 10, 16
MIN_EVALUATIONS, MAX_EVALUATIONS = 5, 8
KL_TARGET_MULTIPLE = 2.0
KL_FIRST_ITERATION_NATS = 0.01
ENTROPY_BASELINE_ITERATIONS = 3
ENTROPY_FRACTION = 0.3
TRUNCATED_FRACTION = 0.2
CLIP_FRACTION = 0.4
RATIO_TOLERANCE = 1e-6
CORRECTED_FRACTION = 0.2
# Of rollout and scoring, a token's log-prob. Its largest difference grows with the number of tokens: rounding in bf16
# reached 0.7 nats among half a million of them.
ROLLOUT_GAP_MEAN_NATS = {"fp32": 1e-3, "bf16": 0.1}
ROLLOUT_GAP_NATS = {"fp32": 1e-2, "bf16": 2.0}
EXPLAINED_VARIANCE_ITERATIONS = 8
DISTINCT_FRACTION_OF_FIRST = 0.5
_FINITE = ("score_mean", "kl_nats_per_response", "entropy_nats_per_token", "policy_loss", "value_loss")


class Alarms:
    """The alarms of one PPO run. Pass every `PPOStep`, in order, to `check`."""

    def __init__(self, config: PPOConfig):
        self.config = config
        self._last_raised: dict[str, int] = {}
        self._entropies: list[float] = []
        self._explained: list[float] = []
        self._scores: list[list[float]] = []  # [reward-model score, task score] of the last iterations
        self._heldout: list[list[float]] = []  # the same of the last evaluations
        self._first_distinct: float | None = None

    def check(self, step: PPOStep) -> list[str]:
        """Return the messages of the alarms that this iteration raises."""
        self._record(step)
        messages = []
        for name, message in self._conditions(step):
            last = self._last_raised.get(name)
            if last is None or step.iteration - last >= REPEAT_ITERATIONS:
                self._last_raised[name] = step.iteration
                messages.append(message)
        return messages

    def observe(self, evaluation: Evaluation) -> None:
        """Record an evaluation that belongs to no iteration: the one before training."""
        if self._first_distinct is None:
            self._first_distinct = evaluation.distinct_fraction
        model, task = evaluation.reward_model_score_mean, evaluation.function_score_mean
        if _is_finite(model) and _is_finite(task):
            self._heldout = [*self._heldout, [float(model), float(task)]][-MAX_EVALUATIONS:]

    def state(self) -> dict[str, Any]:
        """Return the state of `check`, as plain JSON types."""
        return {
            "last_raised": dict(self._last_raised),
            "entropies": list(self._entropies),
            "explained": list(self._explained),
            "scores": [list(row) for row in self._scores],
            "heldout": [list(row) for row in self._heldout],
            "first_distinct": self._first_distinct,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a result of `state`."""
        self._last_raised = {name: int(iteration) for name, iteration in state["last_raised"].items()}
        self._entropies = list(state["entropies"])
        self._explained = list(state["explained"])
        self._scores = [list(row) for row in state["scores"]]
        self._heldout = [list(row) for row in state["heldout"]]
        self._first_distinct = state["first_distinct"]

    def _record(self, step: PPOStep) -> None:
        if len(self._entropies) < ENTROPY_BASELINE_ITERATIONS and _is_finite(step.entropy_nats_per_token):
            self._entropies.append(float(step.entropy_nats_per_token))
        if _is_finite(step.value_explained_variance):
            explained = [*self._explained, float(step.value_explained_variance)]
            self._explained = explained[-EXPLAINED_VARIANCE_ITERATIONS:]
        model, task = step.reward_model_score_mean, step.function_score_mean
        if _is_finite(model) and _is_finite(task):
            self._scores = [*self._scores, [float(model), float(task)]][-MAX_ITERATIONS:]
        if step.evaluation is not None:
            self.observe(step.evaluation)

    def _conditions(self, step: PPOStep) -> Iterator[tuple[str, str]]:
        yield from self._not_finite(step)
        yield from self._divergence("sampled answers", self._scores, MIN_ITERATIONS, "iterations")
        if step.evaluation is not None:
            yield from self._divergence("held-out answers", self._heldout, MIN_EVALUATIONS, "evaluations")
        yield from self._drift(step)
        yield from self._answers(step)
        yield from self._exactness(step)
        yield from self._critic(step)

    def _not_finite(self, step: PPOStep) -> Iterator[tuple[str, str]]:
        figures = {name: getattr(step, name) for name in _FINITE}
        names = [name for name, x in figures.items() if x is not None and not math.isfinite(x)]
        if names:
            yield "not finite", f"Not finite: {', '.join(names)}. Lower ppo.optimizer.lr or set ppo.run.dtype=fp32."
        if step.skipped_steps:
            yield (
                "skipped",
                f"{step.skipped_steps} optimizer steps were skipped (allowed: 0) because a loss or gradient was not "
                f"finite. Lower ppo.optimizer.lr and ppo.critic.optimizer.lr, or set ppo.run.dtype=fp32.",
            )

    def _divergence(self, answers: str, rows: list[list[float]], min_rows: int, unit: str) -> Iterator[tuple[str, str]]:
        if len(rows) < min_rows:
            return
        model, task = (np.array(column) for column in zip(*rows, strict=True))
        model_t, task_t = trend(model), trend(task)
        figures = (
            f"over the last {len(rows)} {unit} of {answers}: reward-model score {model[0]:.3g} to {model[-1]:.3g}, "
            f"task score {task[0]:.3g} to {task[-1]:.3g}; both beyond {TREND_T} standard errors"
        )
        if model_t > TREND_T and task_t < -TREND_T:
            yield (
                f"hacking {unit}",
                f"The reward model is being gamed: its score rises while the task score falls, {figures}. Use an "
                f"earlier checkpoint, lower ppo.reward_model_weight, raise ppo.reward_function_weight or ppo.kl_coef "
                f"(now {self.config.kl_coef:g}), or train the reward model on answers of this actor.",
            )
        elif model_t < -TREND_T and task_t > TREND_T:
            yield (
                f"parting {unit}",
                f"The reward model disagrees with the task score: its score falls while the task score rises, "
                f"{figures}. Check the reward model's held-out accuracy, or lower its weight "
                f"(ppo.reward_model_weight).",
            )

    def _drift(self, step: PPOStep) -> Iterator[tuple[str, str]]:
        kl, limit = step.kl_nats_per_response, KL_TARGET_MULTIPLE * self.config.kl_target_nats_per_response
        if kl > limit:
            yield (
                "kl",
                f"KL from the reference is {kl:.3g} nats per response, more than twice its target "
                f"({limit:g} nats). Raise ppo.kl_coef (now {step.kl_coef:.3g}), set ppo.kl_control=adaptive, or lower "
                f"ppo.optimizer.lr.",
            )
        if len(self._entropies) == ENTROPY_BASELINE_ITERATIONS and step.iteration > ENTROPY_BASELINE_ITERATIONS:
            first = sum(self._entropies) / len(self._entropies)
            if step.entropy_nats_per_token < ENTROPY_FRACTION * first:
                yield (
                    "entropy",
                    f"Entropy collapsed: {step.entropy_nats_per_token:.3g} nats per token, below "
                    f"{ENTROPY_FRACTION:.0%} of the first iterations' {first:.3g}. Raise ppo.entropy_coef "
                    f"(now {self.config.entropy_coef:g}) or ppo.kl_coef, or lower ppo.optimizer.lr.",
                )
        corrected = step.correction_fraction
        if corrected is not None and corrected > CORRECTED_FRACTION:
            bounds = f"ppo.tis_cap (now {self.config.tis_cap:g})"
            if self.config.correction == "dis":
                bounds = f"ppo.dis_low and ppo.dis_high (now {self.config.dis_low:g} and {self.config.dis_high:g})"
            yield (
                "correction",
                f"ppo.correction={self.config.correction} caps or masks {corrected:.0%} of the tokens (threshold "
                f"{CORRECTED_FRACTION:.0%}): the policy is far from the one that sampled. Raise {bounds}, or lower "
                f"ppo.optimizer.lr or ppo.ppo_epochs (now {self.config.ppo_epochs}).",
            )
        if step.clip_fraction > CLIP_FRACTION and self.config.correction != "dis":
            yield (
                "clip",
                f"{step.clip_fraction:.0%} of the tokens are clipped (threshold {CLIP_FRACTION:.0%}): updates are too "
                f"large. Lower ppo.optimizer.lr or ppo.ppo_epochs (now {self.config.ppo_epochs}).",
            )

    def _answers(self, step: PPOStep) -> Iterator[tuple[str, str]]:
        if step.truncated_fraction > TRUNCATED_FRACTION:
            yield (
                "truncated",
                f"{step.truncated_fraction:.0%} of the answers are truncated (threshold {TRUNCATED_FRACTION:.0%}). "
                f"Raise ppo.sampling.max_new_tokens (now {self.config.sampling.max_new_tokens}) or set "
                f"ppo.missing_eos_penalty (now {self.config.missing_eos_penalty:g}).",
            )
        first = self._first_distinct
        if step.evaluation is not None and first is not None:
            distinct, limit = step.evaluation.distinct_fraction, DISTINCT_FRACTION_OF_FIRST * first
            if distinct < limit:
                yield (
                    "distinct",
                    f"Answers became alike: {distinct:.0%} of the held-out answers are distinct, below half of the "
                    f"first evaluation's {first:.0%}. Raise ppo.kl_coef or ppo.entropy_coef, or check which answers "
                    f"get the highest score.",
                )

    def _exactness(self, step: PPOStep) -> Iterator[tuple[str, str]]:
        config = self.config
        is_frozen = config.optimizer.lr == 0 or step.iteration <= config.critic_warmup
        # Under dis the ratio is to the rollout's probability, which differs by rounding.
        if config.correction != "dis" and (is_frozen or config.ppo_epochs * config.minibatches == 1):
            reason = "the actor does not learn" if is_frozen else "there is one optimizer step per iteration"
            # Where responses left, the update reads other micro-batches than scoring, as rollout does.
            limit = ROLLOUT_GAP_NATS[config.run.dtype] if step.zero_advantage_fraction else RATIO_TOLERANCE
            if max(abs(step.ratio_min - 1.0), abs(step.ratio_max - 1.0)) > limit:
                yield (
                    "ratio",
                    f"The ratio of new to old probability must be 1 because {reason}, but it goes from "
                    f"{step.ratio_min:.8g} to {step.ratio_max:.8g} (tolerance {limit:g}): scoring and update "
                    f"do not compute the same. Fix ppo.chunk_rows and report this.",
                )
        if step.iteration == 1 and config.reference in ("", config.actor) and config.actor_is_inferred:
            kl = step.kl_nats_per_response
            if abs(kl) > KL_FIRST_ITERATION_NATS:
                yield (
                    "first kl",
                    f"KL is {kl:.3g} nats per response in the first iteration, when actor and reference are the same "
                    f"model (tolerance {KL_FIRST_ITERATION_NATS:g}). Check ppo.actor and ppo.reference, and report "
                    f"this if they are the same.",
                )
        mean, largest, dtype = step.rollout_logprob_gap_mean, step.rollout_logprob_gap_max, config.run.dtype
        mean_limit, limit = ROLLOUT_GAP_MEAN_NATS[dtype], ROLLOUT_GAP_NATS[dtype]
        if (mean is not None and mean > mean_limit) or (largest is not None and largest > limit):
            found = f"up to {largest:.3g} nats" if mean is None else f"{mean:.3g} nats per token, up to {largest:.3g}"
            yield (
                "gap",
                f"Log-probs of rollout and scoring differ by {found} (thresholds {mean_limit:g} and {limit:g} in "
                f"{dtype}): the ratios are wrong. Set ppo.run.dtype=fp32; if it lasts, report this.",
            )

    def _critic(self, step: PPOStep) -> Iterator[tuple[str, str]]:
        explained = self._explained
        if len(explained) == EXPLAINED_VARIANCE_ITERATIONS and max(explained) < 0:
            yield (
                "critic",
                f"The critic is worse than a constant: explained variance was negative for "
                f"{EXPLAINED_VARIANCE_ITERATIONS} iterations (threshold 0, now {explained[-1]:.2f}). Raise "
                f"ppo.critic.warmup_iterations (now {self.config.critic.warmup_iterations}) or "
                f"ppo.critic.optimizer.lr (now {self.config.critic.optimizer.lr:g}), or widen ppo.value_clip.",
            )


def trend(series: Any) -> float:
    """Return Student's t of a series: the slope of its least-squares line over the slope's standard error.

    0 for fewer than three points or no change; infinite for a line without noise.
    """
    y = np.asarray(series, dtype=np.float64)
    if y.size < 3:
        return 0.0
    x = np.arange(y.size) - (y.size - 1) / 2
    slope = float(x @ (y - y.mean()) / (x @ x))
    residual = y - y.mean() - slope * x
    error = math.sqrt(float(residual @ residual) / (y.size - 2) / float(x @ x))
    if abs(slope) * y.size <= 1e-9 * max(1.0, float(np.abs(y).max())):
        return 0.0
    return slope / error if error > 1e-12 * abs(slope) else math.copysign(math.inf, slope)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
