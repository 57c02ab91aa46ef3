"""The outcome of the run: exact match on test prompts, the curves of the three trainings, the picture and the page.

Settings were chosen on validation prompts; only this module reads the test prompts.
"""

from pathlib import Path
from typing import Any

from icegrt import SFTConfig
from icegrt.data import open_rows
from icegrt.report.page import write_ppo_report
from icegrt.report.plots import Panel, Series
from sorting.curve import measure, ppo_curve, sft_curve
from sorting.picture import write_picture
from staged_run.assessment import PPOOutcome, assess_answers, greedy_examples, read_json, read_prompts

__all__ = ["Outcome", "assess_actor", "assess_sft"]

SAMPLES = 2
FIXED_EXAMPLES = RANDOM_EXAMPLES = 6


def assess_actor(trainer: Any, data: Path) -> dict[str, Any]:
    """Return scored sampled and greedy answers of PPO's actor to the test prompts, as JSON. Collective."""
    return assess_answers(trainer, read_prompts(data / "test.jsonl", trainer), SAMPLES)


def assess_sft(trainer: Any, data: Path) -> dict[str, float]:
    """Return the exact match of an SFT trainer's model on the test prompts. Collective."""
    prompts = read_prompts(data / "test.jsonl", trainer)
    return {
        "exact_match": measure(trainer, prompts, SAMPLES),
        "greedy_exact_match": measure(trainer, prompts, greedy=True),
    }


class Outcome(PPOOutcome):
    """The figures of a run, from the files of its stages in `out`."""

    def __init__(self, out: Path) -> None:
        super().__init__(out, open_rows(out / "data" / "test.jsonl"))
        self.alone = read_json(out / "assessment_sft_alone.json")
        sft = sft_curve(out / "sft")
        self.curves = {
            "SFT": sft,
            "PPO": ppo_curve(out / "ppo").after(sft.seconds[-1]),
            "SFT alone, continued": sft_curve(out / "sft_alone").after(sft.seconds[-1]),
        }
        self.labelled = len(open_rows(out / "data" / "sft.jsonl"))
        self.figures = self._figures()

    def write(self) -> Path:
        """Write report.json, report.html, curves.png and learning.png. Return the page's path."""
        write_picture(self.out / "learning.png", self.curves, self.labelled)
        # The page's other curves are those of the PPO run, whose metrics and settings it reads in its own folder.
        page = write_ppo_report(
            self.out / "ppo",
            self.figures,
            examples=self._examples(),
            title="Six digits to sort: a short SFT, then PPO on exact match",
            notes=[
                f"{len(self.rows)} test prompts; their answers occur in no training row. {SAMPLES} sampled answers and "
                "one greedy answer each, before and after PPO. Task score: the fraction of answers that are exactly "
                "the digits in order. It is the whole reward, so the total score equals it.",
                *self.lines(),
            ],
            settings=[SFTConfig.load(self.out / "sft" / "config.yaml"), self.config],
            panels=[self._panel()],
        )
        for name in ("report.json", "report.html", "curves.png"):
            (self.out / name).write_bytes((page.parent / name).read_bytes())
        return self.out / "report.html"

    def lines(self) -> list[str]:
        """Return the outcome as lines for a terminal: each figure with its requirement."""
        figures = self.figures
        before, after, alone = (figures[f"exact_match_{when}"] for when in ("before", "after", "sft_alone"))
        best = max(self.curves["SFT alone, continued"].exact_match)
        seconds = figures["seconds_sft"] + figures["seconds_ppo"]
        checks = [
            (before < 0.2, f"exact match before PPO {before:.3f} (below 0.2)"),
            (after >= 0.9, f"exact match after PPO {after:.3f} (at least 0.9)"),
            (
                max(alone, best) < 0.6,
                f"SFT alone for the same time {alone:.3f}, at best {best:.3f} on validation prompts (below 0.6)",
            ),
            (
                seconds <= 180,
                f"SFT and PPO took {seconds:.0f} s with evaluations (at most 180 on two idle cores)",
            ),
        ]
        return [f"{'ok   ' if passed else 'SHORT'} {text}" for passed, text in checks]

    def _figures(self) -> dict[str, Any]:
        ppo = self.task_figures()
        return {
            "exact_match_before": ppo["task_score_before"],
            "exact_match_after": ppo["task_score_after"],
            "exact_match_sft_alone": self.alone["exact_match"],
            "greedy_exact_match_before": ppo["greedy_task_score_before"],
            "greedy_exact_match_after": ppo["greedy_task_score_after"],
            "greedy_exact_match_sft_alone": self.alone["greedy_exact_match"],
            "seconds_sft": self._stage_seconds("sft"),
            "seconds_ppo": self._stage_seconds("ppo"),
            "seconds_sft_alone": self._stage_seconds("sft_alone"),
            "ppo": ppo,
        }

    def _stage_seconds(self, name: str) -> float:
        return float(read_json(self.out / "stages" / f"{name}.json")["seconds"])

    def _panel(self) -> Panel:
        series = [Series(name, curve.seconds, curve.exact_match, markers=True) for name, curve in self.curves.items()]
        return Panel(
            "Exact match", "of sampled answers to validation prompts", tuple(series), x_label="seconds of training"
        )

    def _examples(self) -> list[dict[str, Any]]:
        return greedy_examples(self.rows, self.before, self.after, FIXED_EXAMPLES, RANDOM_EXAMPLES)
