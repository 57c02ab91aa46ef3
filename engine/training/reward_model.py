"""Reward model training: from ICE-Instruct to ICE-Reward, by the pairwise loss over rankings."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

from icegrt.checkpoint.directory import best_of, list_checkpoints
from icegrt.config import RewardConfig
from icegrt.data import BlendedDataset, ConcatDataset, EncodedDataset, Ranking, RankingEncoder, untied_pairs
from icegrt.data.training_data import exclude_heldout, hold_out, packed
from icegrt.data.types import Rows
from icegrt.distributed.pipeline import fetch_from_last_stage
from icegrt.errors import DataError
from icegrt.metrics import RewardStep
from icegrt.model.hf.reader import HFCheckpointReader
from icegrt.model.hf.score_statistics import SCORE_STATISTICS, score_statistics
from icegrt.roles.micro_batch import MicroBatch, merge_by_type
from icegrt.roles.role import TrainableRole
from icegrt.roles.skip_guard import SkipGuard
from icegrt.training.ranking_loss import (
    RankingQuality,
    RankingStats,
    RewardModelLoss,
    evaluate_ranking,
    pack_group,
    pack_rankings,
)
from icegrt.training.reward_summary import heldout_figures, surprises
from icegrt.training.single_model import OneModelTrainer
from icegrt.training.trainer import write_json
from icegrt.utils.console import print_info, warn
from icegrt.utils.trace import trace_range


class RewardTrainer(OneModelTrainer[RewardConfig, RewardStep]):
    """Trains a scalar head and its trunk on rankings; iterating yields `RewardStep`. Arguments: see `OneModelTrainer`.

    The model may come with or without a score head.
    """

    def _build(self, pretrained: HFCheckpointReader, data: Rows | None, heldout: Rows | None) -> TrainableRole:
        config = self.config
        sources, heldout_sources = self._training_data(data), self._heldout_data(heldout)
        if not heldout_sources and config.heldout_fraction:
            sources, heldout_sources = hold_out(sources, config.heldout_fraction, self.run.seed)
        elif heldout_sources:
            sources = exclude_heldout(sources, heldout_sources)
        sources = [(_drop_ties(rankings, config.tie_margin), weight) for rankings, weight in sources]
        self.blend = BlendedDataset(sources, self.run.seed)
        self.total_steps = math.ceil(self.blend.count(config.epochs) / config.batch_prompts)
        self.eval_every = config.eval_every or max(1, math.ceil(self.total_steps / config.epochs / 4))
        model = self._build_model(pretrained, "scalar", "reward")
        role = TrainableRole("reward", model, config.optimizer, self.total_steps)
        self.train_rankings = ConcatDataset([rankings for rankings, _ in sources])
        self.heldout_rankings = ConcatDataset(heldout_sources)
        pack = partial(pack_group, tie_margin=config.tie_margin)
        self.heldout = packed(self.heldout_rankings, config.token_budget, pack, self.cluster.share)
        self._batches = self.blend.batches(config.batch_prompts, config.epochs)  # starts where `load_state` puts it
        self._skip_guard = SkipGuard(role.name)
        self._best_loss: float | None = None
        self._evaluations_without_improvement = 0
        self._before: dict[str, Any] | None = None
        self._scores_by_step: dict[int, dict[str, float]] = {}  # of the last evaluation alone
        return role

    def _evaluate_at_start(self) -> None:
        quality = self.evaluate() if self._before is None else None
        if quality is not None:
            statistics = self._scores_by_step[self.done_steps]
            self._before = {"loss": quality.loss, "accuracy": quality.accuracy, "statistics": statistics}

    def _encoder(self) -> RankingEncoder:
        return RankingEncoder(self.tokenizer, self.max_length, self.config.truncation, self.stop_ids)

    def _too_long(self, item: Ranking) -> str:
        return (
            f"all {len(item.responses)} responses have {len(item)} tokens together, more than reward.token_budget "
            f"{self.config.token_budget}; raise it (a prompt's responses share a batch)"
        )

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs beside weights and optimizers, as JSON."""
        return {
            "blend": self.blend.state(),
            "without_better": self._evaluations_without_improvement,
            "best_loss": self._best_loss,
            "before": self._before,
            "score_statistics": self._statistics(),
            "skipped_in_a_row": self._skip_guard.skipped_in_a_row,
            "stopped": self.done_steps >= self.total_steps,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore `state()`."""
        self.blend.load_state(state["blend"])
        self._evaluations_without_improvement = state["without_better"]
        self._best_loss = state["best_loss"]
        self._before = state["before"]
        if statistics := state.get("score_statistics"):
            self._scores_by_step = {self.done_steps: statistics["after"]}
        self._skip_guard.skipped_in_a_row |= state.get("skipped_in_a_row", {})
        if state["stopped"]:
            self.total_steps = self.done_steps

    def step(self) -> RewardStep:
        """Take one optimizer step over the next prompts. Returns its metrics, which are logged."""
        self._begin_step()
        with trace_range("batching"):
            rankings = [self.blend.item(pair) for pair in self._next_batch()]
            batches = pack_rankings(rankings, self.config.token_budget, self.config.tie_margin, self.cluster.share)
        loss = RewardModelLoss(self.role)
        outcome = self.role.train_step([MicroBatch(batch, loss) for batch in batches])
        self.done_steps += 1
        stats = fetch_from_last_stage(merge_by_type(outcome.stats))[RankingStats]
        loss_sum, prompts, right, pairs = self.cluster.all_reduce_sum(
            [
                stats.loss_sum,
                sum(batch.prompts for batch in batches),
                float((stats.difference_P > 0).sum() + 0.5 * (stats.difference_P == 0).sum()),
                stats.difference_P.numel(),
            ]
        )
        with trace_range("evaluation"):
            quality = self.evaluate() if self.done_steps % self.eval_every == 0 else None
        row = RewardStep(
            step=self.done_steps,
            epoch=self.blend.consumed / max(self.blend.count(1.0), 1),
            loss=loss_sum / max(prompts, 1),
            accuracy=right / pairs if pairs else 0.5,
            heldout_loss=quality.loss if quality else None,
            heldout_accuracy=quality.accuracy if quality else None,
            lr=outcome.lr,
            grad_norm=outcome.grad_norm,
        )
        self.log(row)
        self._skip_guard.check(self.role.name, [outcome])
        if quality:
            self._stop_early_if_due(quality)
            if self.done_steps < self.total_steps:
                self.write_report()
            self.save_checkpoint(-quality.loss)
        self.notify("on_update", row)
        return row

    def describe(self, step: RewardStep) -> dict[str, float]:
        """Return the figures of a step for the progress line."""
        if step.heldout_loss is None or step.heldout_accuracy is None:
            return {"loss": step.loss}
        return {"loss": step.loss, "held_out": step.heldout_loss, "accuracy": step.heldout_accuracy}

    def _stop_early_if_due(self, quality: RankingQuality) -> None:
        # The checkpoint of the best held-out loss is never pruned; `finish` exports its weights.
        if quality.loss < (math.inf if self._best_loss is None else self._best_loss):
            self._best_loss = quality.loss
            self._evaluations_without_improvement = 0
            return
        self._evaluations_without_improvement += 1
        if self.config.patience and self._evaluations_without_improvement >= self.config.patience:
            print_info(
                f"held-out loss has not improved for {self._evaluations_without_improvement} evaluations: stopping"
            )
            self.total_steps = self.done_steps

    def evaluate(self) -> RankingQuality | None:
        """Return held-out loss, accuracy and scores; None without held-out data."""
        if not self.heldout:
            return None
        quality = evaluate_ranking(self.role, self.heldout, self.cluster)
        self._scores_by_step = {self.done_steps: score_statistics(quality.score_N)}
        return quality

    def _statistics(self) -> dict[str, Any] | None:
        """Return the statistics of held-out scores before training and now; None if this step was not evaluated."""
        scores = self._scores_by_step.get(self.done_steps)
        return {"before": self._before["statistics"], "after": scores} if self._before and scores else None

    def save_pretrained(self, out: str | Path, statistics: dict[str, Any] | None = None) -> Path:
        """Write an `AutoModelForSequenceClassification` with one label.

        Args:
            out: the folder.
            statistics: of its scores, for `score_statistics.json`. Default: those of an evaluation at this step.
        """
        files = _statistics_file(statistics or self._statistics())
        return self.role.save_pretrained(out, self.run.dtype, self.tokenizer, files)

    def finish(self) -> dict[str, Any]:
        """Evaluate the best weights; write the last checkpoint and `<run.dir>/model`. Returns the summary."""
        self.complete_checkpoint()
        best = self.cluster.broadcast_from_main(
            best_of(list_checkpoints(self.dir)) if self._best_loss is not None else None
        )
        if best is not None:
            self.checkpoints.load_weights(best, self.roles)
        after = self.evaluate()
        summary: dict[str, Any] = {"steps": self.done_steps}
        if after is not None:
            assert self._before is not None  # measured before the first step
            figures = heldout_figures(self.config, self._before, after, self.heldout_rankings, self.train_rankings)
            summary |= figures
            for message in surprises(figures):
                warn(message)
        self.save_checkpoint(None if after is None else -after.loss)
        self.write_model(_statistics_file(self._statistics()))
        write_json(self.dir / "summary.json", summary)
        self.write_report()
        return summary


def _statistics_file(statistics: dict[str, Any] | None) -> dict[str, Any]:
    return {SCORE_STATISTICS: statistics} if statistics else {}


def _drop_ties(rankings: EncodedDataset[Ranking], tie_margin: float) -> EncodedDataset[Ranking]:
    # A prompt without a pair has no loss, so its forward pass would be wasted.
    chosen = [i for i, ranking in enumerate(rankings) if untied_pairs(ranking.scores, tie_margin, ranking.responses)]
    if not chosen:
        raise DataError(
            f"{rankings.name}: no prompt has responses whose scores differ by reward.tie_margin {tie_margin:g} or "
            "more, so there is nothing to learn; lower it, or rank other responses"
        )
    if len(chosen) < len(rankings):
        print_info(
            f"{rankings.name}: {len(rankings) - len(chosen):,} of {len(rankings):,} prompts have only ties: dropped"
        )
    return rankings.subset(chosen)


def run(config: RewardConfig) -> None:
    """Run the command: train, and print the accuracy on held-out pairs."""
    with RewardTrainer(config) as trainer:
        summary = trainer.train()
        if summary.get("heldout_pairs") == 0:
            print_info("held-out accuracy is not known: held-out answers to one prompt all tie")
        elif "heldout_accuracy" in summary:
            print_info(
                f"held-out accuracy {summary['heldout_accuracy']:.3f} on {summary['heldout_pairs']} untied pairs "
                f"({summary['heldout_tie_fraction']:.0%} ties)"
            )
        if "baseline_accuracy" in summary:
            print_info(f"best single feature: {summary['baseline_feature']} {summary['baseline_accuracy']:.3f}")
        print_info(f"model: {trainer.dir / 'model'}")
