"""`icegrt value`: a critic learns the Monte-Carlo returns of a fixed policy, until held-out ones say stop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from icegrt.checkpoint.directory import best_of, list_checkpoints
from icegrt.config import DataSource, PPOConfig, ValueConfig
from icegrt.data import BlendedDataset, ConcatDataset, load_tokenizer
from icegrt.data.rollouts import ROLLOUTS, RolloutEncoder, ValueExample, open_rollouts, run_folder
from icegrt.data.training_data import exclude_heldout, hold_out, packed
from icegrt.data.types import Rows
from icegrt.distributed.pipeline import fetch_from_last_stage
from icegrt.errors import ConfigError
from icegrt.metrics import ValueStep
from icegrt.model.hf.reader import HFCheckpointReader
from icegrt.ppo.value_sampling import sample_rollouts
from icegrt.roles.freezing import check_freeze, freeze
from icegrt.roles.micro_batch import MicroBatch, merge_by_type
from icegrt.roles.role import TrainableRole
from icegrt.roles.skip_guard import SkipGuard
from icegrt.training.run_folder import save_config
from icegrt.training.single_model import EncodedSources, OneModelInputs, OneModelTrainer
from icegrt.training.trainer import write_json
from icegrt.training.value_loss import (
    ValueQuality,
    ValueRegressionLoss,
    evaluate_values,
    pack_group,
    pack_value_examples,
    reduced,
)
from icegrt.utils.console import print_info, warn
from icegrt.utils.files import model_folder
from icegrt.utils.trace import trace_range


class ValueTrainer(OneModelTrainer[ValueConfig, ValueStep]):
    """Trains a critic on the returns of rollouts; iterating yields `ValueStep`. Arguments: see `OneModelTrainer`.

    The model may come with or without a value head. Rows are those of `rollouts/*.jsonl` of a PPO run; without any the
    run samples them, as `value.ppo` says.
    """

    def _set_up(self, inputs: OneModelInputs) -> None:
        config = self.config
        check_freeze(config.freeze, "value.freeze")
        if inputs.data is None and bool(config.data) == bool(config.ppo):
            raise ConfigError(
                f"value.data and value.ppo are {'both set' if config.ppo else 'both empty'}: name recorded rollouts in "
                "value.data, or in value.ppo a file whose `ppo` section says how to sample them"
            )
        super()._set_up(inputs)

    def _build(self, pretrained: HFCheckpointReader, data: Rows | None, heldout: Rows | None) -> TrainableRole:
        config = self.config
        self._vocab_size = pretrained.architecture.vocab_size
        sources, heldout_sources = self._training_data(data), self._heldout_data(heldout)
        if not heldout_sources:
            sources, heldout_sources = hold_out(sources, config.heldout_fraction, self.run.seed)
        else:
            sources = exclude_heldout(sources, heldout_sources)
        self.blend = BlendedDataset(sources, self.run.seed)
        self.total_steps = math.ceil(self.blend.count(config.epochs) / config.batch_sequences)
        self.eval_every = config.eval_every or max(1, math.ceil(self.total_steps / config.epochs / 4))
        model = self._build_model(pretrained, "scalar", "critic")
        freeze(model, config.freeze, "value.freeze")
        role = TrainableRole("critic", model, config.optimizer, self.total_steps)
        self.heldout_examples = ConcatDataset(heldout_sources)
        self.heldout = packed(self.heldout_examples, config.token_budget, pack_group, self.cluster.share)
        self._batches = self.blend.batches(config.batch_sequences, config.epochs)  # starts where `load_state` puts it
        self._skip_guard = SkipGuard(role.name)
        self._before: float | None = None
        self._best: float | None = None
        self._evaluations_without_improvement = 0
        return role

    def _encode(self, key: str, files: list[DataSource], rows: Rows | None) -> EncodedSources:
        if rows is not None:
            return super()._encode(key, files, rows)
        files = self._sampled() if key == "data" and self.config.ppo else files
        self._check_tokenizers(files)
        sources = []
        for source in files:
            # The files of a run are one source: a prompt that comes again is then held out of all of them or of none.
            ((items, _),) = super()._encode(key, [], open_rollouts(source.path))
            sources.append((items, source.weight))
        return sources

    def _sampled(self) -> list[DataSource]:
        """Return the file of sampled rollouts, which a resumed run has already. Collective."""
        path = self.dir / ROLLOUTS / "sampled.jsonl"
        if not self.cluster.broadcast_from_main(path.is_file()):
            ppo = PPOConfig.load(self.config.ppo)
            if ppo.actor:
                self._check_tokenizer(model_folder(ppo.actor), f"ppo.actor ({ppo.actor})")
            if self.cluster.is_main:
                save_config(self.config, self.dir)  # an interrupted run is then known as a run
            sample_rollouts(ppo, self.config.iterations, path, self.cluster)
            self.cluster.barrier()
        return [DataSource(path=str(path))]

    def _check_tokenizers(self, files: list[DataSource]) -> None:
        """Raise `ConfigError` if the run that rollouts are of has another tokenizer than the model."""
        for folder in sorted({run_folder(source.path) for source in files}):
            if (folder / "tokenizer").is_dir():
                self._check_tokenizer(folder / "tokenizer", f"value.data: the run {folder}")

    def _check_tokenizer(self, folder: Path, name: str) -> None:
        sampled: Any = load_tokenizer(str(folder))
        own: Any = self.tokenizer
        if sampled.get_vocab() != own.get_vocab():
            raise ConfigError(
                f"{name} and value.model ({self.config.model}) map text to different token ids: the critic must read "
                "the tokens that the policy sampled"
            )

    def _encoder(self) -> RolloutEncoder:
        return RolloutEncoder(self._vocab_size, self.max_length, self.config.gamma)

    def _too_long(self, item: ValueExample) -> str:
        return f"{len(item)} tokens, more than value.token_budget {self.config.token_budget}; raise it"

    def _evaluate_at_start(self) -> None:
        if self._before is None and (quality := self.evaluate()) is not None:
            self._before = quality.explained_variance
            if not float(quality.returns.variance):
                warn(
                    "all held-out returns are equal, so no value can explain their variance; record rollouts whose "
                    "scores differ"
                )

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs beside weights and optimizers, as JSON."""
        return {
            "blend": self.blend.state(),
            "before": self._before,
            "best": self._best,
            "without_better": self._evaluations_without_improvement,
            "skipped_in_a_row": self._skip_guard.skipped_in_a_row,
            "stopped": self.done_steps >= self.total_steps,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore `state()`."""
        self.blend.load_state(state["blend"])
        self._before, self._best = state["before"], state["best"]
        self._evaluations_without_improvement = state["without_better"]
        self._skip_guard.skipped_in_a_row |= state["skipped_in_a_row"]
        if state["stopped"]:
            self.total_steps = self.done_steps

    def step(self) -> ValueStep:
        """Take one optimizer step over the next responses. Returns its metrics, which are logged."""
        self._begin_step()
        with trace_range("batching"):
            examples = [self.blend.item(pair) for pair in self._next_batch()]
            batches = pack_value_examples(examples, self.config.token_budget, self.cluster.share)
        loss = ValueRegressionLoss(self.role)
        outcome = self.role.train_step([MicroBatch(batch, loss) for batch in batches])
        self.done_steps += 1
        batch_quality = reduced(fetch_from_last_stage(merge_by_type(outcome.stats))[ValueQuality], self.cluster)
        is_due = self.done_steps % self.eval_every == 0 or self.done_steps == self.total_steps
        with trace_range("evaluation"):
            quality = self.evaluate() if is_due else None
        row = ValueStep(
            step=self.done_steps,
            epoch=self.blend.consumed / max(self.blend.count(1.0), 1),
            loss=batch_quality.loss,
            explained_variance=batch_quality.explained_variance,
            heldout_loss=quality.loss if quality else None,
            heldout_explained_variance=quality.explained_variance if quality else None,
            lr=outcome.lr,
            grad_norm=outcome.grad_norm,
        )
        self.log(row)
        self._skip_guard.check(self.role.name, [outcome])
        if quality:
            self._stop_early_if_due(quality.explained_variance)
            if self.done_steps < self.total_steps:
                self.write_report()
            self.save_checkpoint(quality.explained_variance)
        self.notify("on_update", row)
        return row

    def describe(self, step: ValueStep) -> dict[str, float]:
        """Return the figures of a step for the progress line."""
        if step.heldout_explained_variance is None:
            return {"loss": step.loss}
        return {"loss": step.loss, "held_out": step.heldout_explained_variance}

    def _stop_early_if_due(self, explained_variance: float) -> None:
        # The checkpoint of the highest explained variance is never pruned; `finish` exports its weights.
        if self._best is None or explained_variance > self._best:
            self._best, self._evaluations_without_improvement = explained_variance, 0
            return
        self._evaluations_without_improvement += 1
        if self.config.patience and self._evaluations_without_improvement >= self.config.patience:
            print_info(
                f"held-out explained variance has not risen for {self._evaluations_without_improvement} evaluations: "
                "stopping"
            )
            self.total_steps = self.done_steps

    def evaluate(self) -> ValueQuality | None:
        """Return loss and explained variance of the held-out returns; None without held-out rollouts."""
        return evaluate_values(self.role, self.heldout, self.cluster) if len(self.heldout_examples) else None

    def save_pretrained(self, out: str | Path) -> Path:
        """Write an `AutoModelForSequenceClassification` with one label, for `ppo.critic.model`."""
        return self.role.save_pretrained(out, self.run.dtype, self.tokenizer)

    def finish(self) -> dict[str, Any]:
        """Load the best weights, and write the last checkpoint and `<run.dir>/model`. Returns the summary."""
        self.complete_checkpoint()
        best = self.cluster.broadcast_from_main(best_of(list_checkpoints(self.dir)) if self._best is not None else None)
        if best is not None:
            self.checkpoints.load_weights(best, self.roles)
        after = self.evaluate()
        summary: dict[str, Any] = {"steps": self.done_steps}
        if after is not None:
            summary |= {
                "heldout_explained_variance_before": self._before,
                "heldout_explained_variance_after": after.explained_variance,
                "heldout_loss": after.loss,
                "heldout_responses": len(self.heldout_examples),
                "return_mean": float(after.returns.mean),
                "return_std": float(after.returns.variance.sqrt()),
            }
        self.save_checkpoint(None if after is None else after.explained_variance)
        self.write_model()
        write_json(self.dir / "summary.json", summary)
        self.write_report()
        return summary


def run(config: ValueConfig) -> None:
    """Run the command: train, and print how much of held-out returns the critic explains."""
    with ValueTrainer(config) as trainer:
        summary = trainer.train()
        if "heldout_explained_variance_after" in summary:
            before, after = (summary[f"heldout_explained_variance_{when}"] for when in ("before", "after"))
            print_info(f"held-out explained variance {before:.3f} -> {after:.3f}")
        print_info(f"critic: {trainer.dir / 'model'}")
