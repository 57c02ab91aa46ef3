"""The outcome of the run: answers to the test problems before and after PPO, the comparison of sharings, the report.

Settings were chosen on training and validation problems; only this module reads the test problems.
"""

from pathlib import Path
from typing import Any

import numpy as np

from icegrt import PPOConfig
from icegrt.data import EncodedDataset, PromptEncoder, open_rows
from icegrt.metrics import read_metrics
from icegrt.report.page import write_ppo_report
from smollm2.compare import describe
from staged_run.assessment import answer_figures, columns, greedy_examples, read_json, run_figures, score_gains

__all__ = ["Outcome", "assess_both"]

SAMPLES = 4
FIXED_EXAMPLES = RANDOM_EXAMPLES = 8


def assess_both(trainer: Any, data: Path) -> dict[str, Any]:
    """Return scored sampled and greedy answers to the test problems, as JSON."""
    encoder = PromptEncoder(trainer.tokenizer, trainer.actor.model.architecture.context_length)
    prompts = EncodedDataset(open_rows(data / "test.jsonl"), encoder)
    return {
        "sampled": columns(trainer.assess(prompts, SAMPLES)),
        "greedy": columns(trainer.assess(prompts, 1, greedy=True)),
    }


class Outcome:
    """The figures of a run, from the files of its stages in `out`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.before, self.after = (read_json(out / f"assessment_{when}.json") for when in ("before", "after"))
        self.config = PPOConfig.load(out / "ppo" / "config.yaml")
        self.steps = [row for row in read_metrics(out / "ppo") if row["kind"] == "ppo"]
        self.rows = [row.data for row in open_rows(out / "data" / "test.jsonl")]
        self.comparison = describe(read_json(out / "compare.json"))
        self.figures = self._figures()

    def write(self) -> Path:
        """Write report.json, curves.png and report.html into the folder of the PPO run. Return the page's path."""
        return write_ppo_report(
            self.out / "ppo",
            {"ppo": self.figures},
            examples=self._examples(),
            title="SmolLM2-135M-Instruct: PPO on small sums",
            notes=[
                f"{len(self.rows)} test problems that occur in no training row; {SAMPLES} sampled answers and one "
                "greedy answer each, before and after PPO. Task score: the fraction of answers that are complete and "
                "whose last number is the result. It is the whole reward, so the total score equals it.",
                self.comparison,
            ],
            settings=[self.config],
        )

    def lines(self) -> list[str]:
        """Return the outcome as lines for a terminal."""
        figures, lines = self.figures, []
        for name, label in (("task_score", "sampled"), ("greedy_task_score", "greedy")):
            low, high = figures[f"{name}_gain_ci95"]
            lines.append(
                f"{'ok   ' if low > 0 else 'SHORT'} test score, {label}: {figures[f'{name}_before']:.3f} -> "
                f"{figures[f'{name}_after']:.3f}, 95% interval of the gain {low:+.3f} to {high:+.3f} (above 0)"
            )
        length, truncated = (
            (figures[f"{name}_before"], figures[f"{name}_after"])
            for name in ("response_tokens_mean", "truncated_fraction")
        )
        lines.append(
            f"length {length[0]:.1f} -> {length[1]:.1f} tokens, truncated {truncated[0]:.1%} -> {truncated[1]:.1%}, "
            f"KL {figures['kl_nats_per_response']:.2f} nats per response"
        )
        return [*lines, self.comparison, *(f"alarm: {alarm}" for alarm in figures["alarms"])]

    def _figures(self) -> dict[str, Any]:
        # 1. scores before and after, with intervals
        figures: dict[str, Any] = {"test_prompts": len(self.rows), "iterations": len(self.steps)}
        figures["heldout_reward_name"] = "total score"
        figures |= score_gains(self.before, self.after)
        # 2. figures of the answers before and after
        for when, document in (("before", self.before), ("after", self.after)):
            figures |= answer_figures(when, document["sampled"])
        # 3. figures of the run
        figures["kl_nats_per_response"] = float(np.mean(self.after["sampled"]["kl"]))
        figures["kl_target_nats_per_response"] = self.config.kl_target_nats_per_response
        figures |= run_figures(self.steps, self.out / "ppo")
        return figures

    def _examples(self) -> list[dict[str, Any]]:
        return greedy_examples(self.rows, self.before, self.after, FIXED_EXAMPLES, RANDOM_EXAMPLES)
