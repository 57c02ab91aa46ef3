"""Supervised fine-tuning: from a base model to ICE-Instruct. Loss on responses only, files mixed by weight."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from icegrt.config import SFTConfig
from icegrt.data import BlendedDataset, ConcatDataset, Example, ExampleEncoder
from icegrt.data.training_data import packed
from icegrt.data.types import Rows
from icegrt.distributed.pipeline import fetch_from_last_stage
from icegrt.metrics import SFTStep
from icegrt.model.hf.reader import HFCheckpointReader
from icegrt.roles.micro_batch import MicroBatch, merge_by_type
from icegrt.roles.role import TrainableRole
from icegrt.roles.skip_guard import SkipGuard
from icegrt.training.inputs import resolve_chunk_rows
from icegrt.training.sft_loss import NLLStats, SFTLoss, heldout_loss, pack_examples, pack_group
from icegrt.training.single_model import OneModelTrainer
from icegrt.training.trainer import write_json
from icegrt.utils.console import print_info
from icegrt.utils.trace import trace_range


class SFTTrainer(OneModelTrainer[SFTConfig, SFTStep]):
    """Fine-tunes a causal language model; iterating yields `SFTStep`. Arguments: see `OneModelTrainer`."""

    def _build(self, pretrained: HFCheckpointReader, data: Rows | None, heldout: Rows | None) -> TrainableRole:
        config = self.config
        sources = self._training_data(data)
        self.heldout = ConcatDataset(self._heldout_data(heldout))
        self.blend = BlendedDataset(sources, self.run.seed)
        self.total_steps = math.ceil(self.blend.count(config.epochs) / config.batch_sequences)
        model = self._build_model(pretrained, "lm", "actor")
        role = TrainableRole("actor", model, config.optimizer, self.total_steps)
        self.chunk_rows = resolve_chunk_rows(config.chunk_rows, pretrained.architecture, self._resumed_chunk_rows)
        self._batches = self.blend.batches(config.batch_sequences, config.epochs)  # starts where `load_state` puts it
        self._skip_guard = SkipGuard(role.name)
        self._heldout_batches = packed(self.heldout, config.token_budget, pack_group, self.cluster.share)
        self._heldout_before: float | None = None
        self._heldout_after: float | None = None
        self._evaluated_at: int | None = None
        return role

    def _evaluate_at_start(self) -> None:
        if self._heldout_before is None:
            self._heldout_before = self.evaluate()

    def _encoder(self) -> ExampleEncoder:
        return ExampleEncoder(self.tokenizer, self.max_length, self.config.truncation, self.stop_ids)

    def _too_long(self, item: Example) -> str:
        return f"{len(item)} tokens, more than sft.token_budget {self.config.token_budget}; raise it"

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs beside weights and optimizers, as JSON."""
        return {
            "blend": self.blend.state(),
            "heldout_before": self._heldout_before,
            "skipped_in_a_row": self._skip_guard.skipped_in_a_row,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore `state()`."""
        self.blend.load_state(state["blend"])
        self._heldout_before = state["heldout_before"]
        self._skip_guard.skipped_in_a_row |= state.get("skipped_in_a_row", {})

    def step(self) -> SFTStep:
        """Take one optimizer step over the next batch. Returns its metrics, which are logged."""
        self._begin_step()
        started = time.perf_counter()
        with trace_range("batching"):
            examples = [self.blend.item(pair) for pair in self._next_batch()]
            batches = pack_examples(examples, self.config.token_budget, self.cluster.share)
        loss = SFTLoss(self.role, self.chunk_rows)
        outcome = self.role.train_step([MicroBatch(batch, loss) for batch in batches])
        self.done_steps += 1
        seconds = time.perf_counter() - started
        stats = fetch_from_last_stage(merge_by_type(outcome.stats))[NLLStats]
        loss_sum, counted, tokens = self.cluster.all_reduce_sum(
            [stats.loss_sum, stats.tokens, sum(batch.n_tokens for batch in batches)]
        )
        row = SFTStep(
            step=self.done_steps,
            epoch=self.blend.consumed / max(self.blend.count(1.0), 1),
            loss=loss_sum / max(counted, 1),
            heldout_loss=self._evaluate_if_due(),
            tokens=int(tokens),
            tokens_per_second=tokens / seconds,
            lr=outcome.lr,
            grad_norm=outcome.grad_norm,
        )
        self.log(row)
        self._skip_guard.check(self.role.name, [outcome])
        if row.heldout_loss is not None and self.done_steps < self.total_steps:
            self.write_report()
        if self._due(self.config.checkpoint_every):
            self.save_checkpoint(_quality(row.heldout_loss))
        self.notify("on_update", row)
        return row

    def _evaluate_if_due(self) -> float | None:
        """Return the held-out loss every `eval_every` steps and after the last step, else None."""
        if self.done_steps < self.total_steps and not self._due(self.config.eval_every):
            return None
        with trace_range("evaluation"):
            self._evaluated_at, self._heldout_after = self.done_steps, self.evaluate()
        return self._heldout_after

    def _due(self, every: int) -> bool:
        return bool(every) and self.done_steps % every == 0 and self.done_steps < self.total_steps

    def evaluate(self) -> float | None:
        """Return the held-out loss in nats per response token; None without held-out data."""
        if not self._heldout_batches:
            return None
        return heldout_loss(self.role, self._heldout_batches, self.chunk_rows, self.cluster)

    def save_pretrained(self, out: str | Path) -> Path:
        """Write the model as a Hugging Face checkpoint."""
        return self.role.save_pretrained(out, self.run.dtype, self.tokenizer)

    def finish(self) -> dict[str, float | None]:
        """Write the last checkpoint and `<run.dir>/model`. Returns the held-out loss before and after."""
        after = self._heldout_after if self._evaluated_at == self.done_steps else self.evaluate()
        summary = {"heldout_loss_before": self._heldout_before, "heldout_loss_after": after}
        self.save_checkpoint(_quality(summary["heldout_loss_after"]))
        self.write_model()
        write_json(self.dir / "summary.json", summary)
        self.write_report()
        return summary


def _quality(heldout_loss: float | None) -> float | None:
    return None if heldout_loss is None else -heldout_loss


def run(config: SFTConfig) -> None:
    """Run the command: train to the end and print where the model is."""
    with SFTTrainer(config) as trainer:
        summary = trainer.train()
        if summary["heldout_loss_after"] is not None:
            before, after = summary["heldout_loss_before"], summary["heldout_loss_after"]
            print_info(f"held-out loss {before:.4f} -> {after:.4f} nats per response token")
        print_info(f"model: {trainer.dir / 'model'}")
