"""The outcome of the run: answers to the test problems before and after PPO, the comparison of sharings, the report.

Settings were chosen on training and validation problems; only this module reads the test problems.
"""

from pathlib import Path
from typing import Any

from icegrt.data import open_rows
from icegrt.report.page import write_ppo_report
from smollm2.compare import describe
from staged_run.assessment import PPOOutcome, assess_answers, greedy_examples, read_json, read_prompts

__all__ = ["Outcome", "assess_both"]

SAMPLES = 4
FIXED_EXAMPLES = RANDOM_EXAMPLES = 8


def assess_both(trainer: Any, data: Path) -> dict[str, Any]:
    """Return scored sampled and greedy answers to the test problems, as JSON."""
    return assess_answers(trainer, read_prompts(data / "test.jsonl", trainer), SAMPLES)


class Outcome(PPOOutcome):
    """The figures of a run, from the files of its stages in `out`."""

    def __init__(self, out: Path) -> None:
        super().__init__(out, open_rows(out / "data" / "test.jsonl"))
        self.comparison = describe(read_json(out / "compare.json"))
        self.figures = self.task_figures()
        self.figures["kl_target_nats_per_response"] = self.config.kl_target_nats_per_response

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

    def _examples(self) -> list[dict[str, Any]]:
        return greedy_examples(self.rows, self.before, self.after, FIXED_EXAMPLES, RANDOM_EXAMPLES)
