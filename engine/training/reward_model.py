"""Reward model training: from ICE-Instruct to ICE-Reward, by the pairwise loss over rankings."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch

from icegrt.checkpoint.directory import best_of, list_checkpoints
from icegrt.config import RewardConfig
from icegrt.data import BlendedDataset, ConcatDataset, EncodedDataset, Ranking, RankingEncoder, untied_pairs
from icegrt.data.training_data import hold_out, packed
from icegrt.errors import DataError
from icegrt.metrics import RewardStep
from icegrt.model.build import build_model
from icegrt.model.hf import exporter
from icegrt.model.hf.reader import HFCheckpointReader
from icegrt.model.hf.score_statistics import SCORE_STATISTICS, score_statistics
from icegrt.model.hf.writer import save_pretrained
from icegrt.roles.role import Role
from icegrt.training.ranking_loss import RankingQuality, evaluate_ranking, pack_group, pack_rankings, ranking_loss
from icegrt.training.reward_summary import heldout_figures
from icegrt.training.single_model import OneModelTrainer
from icegrt.training.trainer import write_json
from icegrt.utils.console import print_info


class RewardTrainer(OneModelTrainer):
    """Trains a scalar head and its trunk on rankings; iterating yields `RewardStep`. Arguments: see `OneModelTrainer`.

    The model may come with or without a score head.
    """

    def _set_up(self, pretrained: HFCheckpointReader, data: Any, heldout: Any) -> None:
        config = self.config
        sources, held = self._training_data(data), self._heldout_data(heldout)
        if not held and config.heldout_fraction:
            sources, held = hold_out(sources, config.heldout_fraction, self.run.seed)
        sources = [(_drop_ties(rankings, config.tie_margin), weight) for rankings, weight in sources]
        self.blend = BlendedDataset(sources, self.run.seed)
        self.total_steps = math.ceil(self.blend.count(config.epochs) / config.batch_prompts)
        self.eval_every = config.eval_every or max(1, math.ceil(self.total_steps / config.epochs / 4))
        self.role = Role("reward", self._build(pretrained))
        self.role.learn(config.optimizer, self.total_steps)
        self.roles = [self.role]
        self.train_rankings = ConcatDataset([rankings for rankings, _ in sources])
        self.heldout_rankings = ConcatDataset(held)
        pack = partial(pack_group, tie_margin=config.tie_margin)
        self.heldout = packed(self.heldout_rankings, config.token_budget, pack, self.cluster.share)
        self._batches = None
        self._best_loss: float | None = None
        self._without_better = 0
        self._before: dict[str, Any] | None = None
        self._restore_and_open_log(self.tokenizer)
        if self._before is None and self.heldout:
            quality = self.evaluate()
            statistics = score_statistics(quality.score_N)
            self._before = {"loss": quality.loss, "accuracy": quality.accuracy, "statistics": statistics}

    def _build(self, source: HFCheckpointReader):
        return build_model(
            source, "scalar", self.cluster, dtype=self.dtype, new_head=True, recompute=self.run.recompute
        )

    def _encoder(self) -> RankingEncoder:
        return RankingEncoder(self.tokenizer, self.max_length, self.config.truncation, self.stop_ids)

    def _too_long(self, item: Ranking) -> str:
        return (
            f"all {len(item.responses)} responses have {len(item)} tokens together, more than reward.token_budget "
            f"{self.config.token_budget}; raise it (a prompt's responses share a batch)"
        )

    def state(self) -> dict[str, Any]:
        return {
            "blend": self.blend.state(),
            "without_better": self._without_better,
            "best_loss": self._best_loss,
            "before": self._before,
            "stopped": self.done_steps >= self.total_steps,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.blend.load_state(state["blend"])
        self._without_better = state["without_better"]
        self._best_loss = state["best_loss"]
        self._before = state["before"]
        if state["stopped"]:
            self.total_steps = self.done_steps

    def step(self) -> RewardStep:
        """One optimizer step over the next prompts."""
        if self._batches is None:
            self._batches = self.blend.batches(self.config.batch_prompts, self.config.epochs)
        rankings = [self.blend.item(pair) for pair in next(self._batches)]
        ranked = pack_rankings(rankings, self.config.token_budget, self.config.tie_margin, self.cluster.share)

        def loss(hidden_TH, i):
            score_N = self.role.model.head(hidden_TH[ranked[i].batch.last_rows_N.to(hidden_TH.device)])
            return ranking_loss(score_N, ranked[i])

        outcome = self.role.step([r.batch for r in ranked], loss)
        self.done_steps += 1
        difference_P = torch.cat([stats[1] for stats in outcome.stats])
        loss_sum, prompts, right, pairs = self.cluster.all_reduce_sum(
            [
                sum(stats[0] for stats in outcome.stats),
                sum(r.prompts for r in ranked),
                int((difference_P > 0).sum()),
                difference_P.numel(),
            ]
        )
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
        if quality:
            self._watch(quality)
            self.save_checkpoint(-quality.loss)
        self.notify("on_update", row)
        return row

    def describe(self, step: RewardStep) -> dict[str, float]:
        held = {} if step.heldout_loss is None else {"held_out": step.heldout_loss, "accuracy": step.heldout_accuracy}
        return {"loss": step.loss, **held}

    def _watch(self, quality: RankingQuality) -> None:
        # Early stopping: the checkpoint of the best held-out loss is kept, and its weights are the ones to export.
        if self._best_loss is None or quality.loss < self._best_loss:
            self._best_loss = quality.loss
            self._without_better = 0
            return
        self._without_better += 1
        if self.config.patience and self._without_better >= self.config.patience:
            print_info(f"held-out loss has not improved for {self._without_better} evaluations: stopping")
            self.total_steps = self.done_steps

    def evaluate(self) -> RankingQuality | None:
        """Held-out loss, accuracy and scores; None without held-out data."""
        return evaluate_ranking(self.role, self.heldout) if self.heldout else None

    def save_pretrained(self, out: str | Path, statistics: dict[str, Any] | None = None) -> Path:
        """Write an `AutoModelForSequenceClassification` with one label, and its score statistics beside it."""
        return save_pretrained(
            exporter.export_tensors(self.role.model, self.dtype),
            self.role.model.architecture,
            out,
            classifier=True,
            dtype=self.run.dtype,
            tokenizer=self.tokenizer,
            extra_files={SCORE_STATISTICS: statistics} if statistics else None,
        )

    def finish(self) -> dict[str, Any]:
        """Held-out figures with the best weights; the checkpoint, and the model under `<run.dir>/model`."""
        self.complete_checkpoint()
        best = self.cluster.broadcast_from_main(
            best_of(list_checkpoints(self.dir)) if self._best_loss is not None else None
        )
        if best is not None:
            self._checkpoints.load_weights(best, self.roles)
        after = self.evaluate()
        summary: dict[str, Any] = {"steps": self.done_steps}
        statistics = None
        if after is not None:
            summary |= heldout_figures(self.config, self._before, after, self.heldout_rankings, self.train_rankings)
            statistics = {"before": self._before["statistics"], "after": score_statistics(after.score_N)}
        self.save_checkpoint(None if after is None else -after.loss)
        self.write_model(statistics)
        write_json(self.dir / "summary.json", summary)
        return summary


def _drop_ties(rankings: EncodedDataset[Ranking], tie_margin: float) -> EncodedDataset[Ranking]:
    # A prompt without a pair has no loss; a forward pass over it would buy nothing.
    chosen = [i for i, ranking in enumerate(rankings) if untied_pairs(ranking.scores, tie_margin)]
    if not chosen:
        raise DataError(
            f"{rankings.name}: no prompt has responses whose scores differ by reward.tie_margin {tie_margin:g} or "
            "more, so there is nothing to learn; lower it, or rank other responses"
        )
    if len(chosen) < len(rankings):
        print_info(
            f"{rankings.name}: {len(rankings) - len(chosen):,} of {len(rankings):,} prompts have only ties, left out"
        )
    return rankings.subset(chosen)


def run(config: RewardConfig) -> None:
    """The command: train, and print what the model is worth on held-out pairs."""
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
