"""A role: a model and, if it learns, its gradients, optimizer and learning-rate schedule. All of them Megatron's.

Every pass over micro-batches, with or without gradients, goes through Megatron's `get_forward_backward_func`; the
loss is (sum, count, stats) with `calculate_per_token_loss`, so K micro-batches give the gradient of one.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from icegrt.config import OptimizerConfig
from icegrt.distributed.pipeline import all_ranks_true, broadcast_from_last_stage, broadcast_objects_from_last_stage
from icegrt.model.pipeline_model import PipelineModel
from icegrt.packing import PackedBatch
from icegrt.roles.optimizer import make_optimizer, make_scheduler, wait_for_param_gather, wrap

# What a loss returns for a micro-batch: (sum over its tokens, how many tokens it counts, statistics).
Loss = tuple[Tensor, int, Any]


@dataclass(frozen=True)
class StepOutcome:
    """What an optimizer step did. `skipped`: a loss or gradient was not finite, and nothing was changed."""

    stats: list[Any]
    grad_norm: float
    lr: float
    skipped: bool


class Role:
    """actor, reference, reward or critic: `model` holds the weights, `learns` says whether they change.

    Every rank of a layout calls the same methods with the batches of its data-parallel rank. What `read` and `loss`
    say is formed on the last pipeline stage alone (where heads are), and handed to the others.
    """

    def __init__(self, name: str, model: PipelineModel) -> None:
        self.name = name
        self.model = model
        self.learns = False
        self.device = next(model.parameters()).device
        for chunk in model.chunks:
            chunk.requires_grad_(False)
            chunk.eval()

    def learn(self, config: OptimizerConfig, total_steps: int) -> None:
        """Give the role gradients, a distributed optimizer, and a schedule over `total_steps` optimizer steps."""
        from megatron.core.distributed import finalize_model_grads

        self.learns = True
        for chunk in self.model.chunks:
            chunk.requires_grad_(True)
            chunk.train()
        self._ddps = ddps = wrap(self.model)
        for ddp in ddps:
            # Autograd's nodes hold hooks that hold the DDP that holds the nodes: a circle through C++, which Python's
            # collector does not see. Models, gradients and process groups would stay for as long as the process.
            weakref.finalize(self, ddp.grad_accs.clear)
        self.model.register_param_gather(lambda: wait_for_param_gather(ddps))
        self.model.config.finalize_model_grads_func = finalize_model_grads
        self.optimizer = make_optimizer(config, self._ddps, self.model.config)
        self.schedule = make_scheduler(config, self.optimizer, total_steps)

    @torch.no_grad()
    def score(
        self, batches: Sequence[PackedBatch], read: Callable[[Tensor, int], tuple[Tensor, ...]]
    ) -> list[tuple[Tensor, ...]]:
        """Forward passes without gradients: `read(hidden_TH, i)` for the i-th batch, as many vectors for each.

        Returns what was read, in order, as fp32 on the CPU of every rank of the pipeline.
        """

        def collect(index: int):
            def read_rows(hidden_T1H: Tensor, non_loss_data: bool) -> tuple[Tensor, ...]:
                return tuple(x.float().cpu() for x in read(self.model.gather_hidden_rows(hidden_T1H), index))

            return read_rows

        found = self._pass(self.model.chunks, batches, collect, forward_only=True, collect_non_loss_data=True)
        return broadcast_from_last_stage(found, len(batches))

    def step(self, batches: Sequence[PackedBatch], loss: Callable[[Tensor, int], Loss]) -> StepOutcome:
        """One optimizer step: `loss(hidden_TH, i)` for the i-th micro-batch; gradients are of sum over count."""
        self.zero_gradients()
        totals: list[Tensor] = []

        def watched(hidden_TH: Tensor, index: int) -> Loss:
            result = loss(hidden_TH, index)
            totals.append(result[0].detach())
            return result

        stats = self.accumulate(batches, watched)
        lr = self.optimizer.param_groups[0]["lr"]
        # A loss may overflow where its gradient does not, and the other way round.
        finite = all(bool(torch.isfinite(total)) for total in totals) and self._gradients_are_finite()
        if not all_ranks_true(finite):
            return StepOutcome(stats, math.nan, lr, skipped=True)
        _, grad_norm, _ = self.optimizer.step()
        self.schedule.step(increment=1)
        return StepOutcome(stats, float(grad_norm or 0.0), lr, skipped=False)

    def zero_gradients(self) -> None:
        """Forget all gradients."""
        for ddp in self._ddps:
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def accumulate(self, batches: Sequence[PackedBatch], loss: Callable[[Tensor, int], Loss]) -> list[Any]:
        """Forward and backward over all micro-batches, gradients left in the parameters' `main_grad`.

        With several data-parallel ranks `main_grad` is whole only where this rank's share of the optimizer needs it.
        """

        def collect(index: int):
            def loss_of(hidden_T1H: Tensor):
                total, count, stats = loss(self.model.gather_hidden_rows(hidden_T1H), index)
                return total, torch.tensor(count, dtype=torch.int, device=self.device), stats

            return loss_of

        return broadcast_objects_from_last_stage(self._pass(self._ddps, batches, collect, forward_only=False))

    def _pass(self, chunks, batches: Sequence[PackedBatch], collect, **how) -> list[Any]:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        def forward(iterator, chunk):
            index, batch = next(iterator)
            model = getattr(chunk, "module", chunk)
            return model.hidden(batch.to(self.device)), collect(index)

        iterators = [iter(enumerate(batches)) for _ in chunks]
        return get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=list(chunks),
            num_microbatches=len(batches),
            seq_length=max(batch.tokens_T.numel() for batch in batches),
            micro_batch_size=1,
            **how,
        )

    def _gradients_are_finite(self) -> bool:
        return all(bool(torch.isfinite(buffer.grad_data.sum())) for ddp in self._ddps for buffer in ddp.buffers)
