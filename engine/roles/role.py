"""Roles: a loaded model with its passes over micro-batches, frozen (`Role`) or trained (`TrainableRole`).

PPO has the roles actor, reference, reward and critic. SFT and reward training have one role.

Every pass goes through Megatron's `get_forward_backward_func`. A micro-batch is copied to the device once, while the
one before it is computed. The model's last pipeline stage then calls `fn(hidden_TH, batch)`: a reader of results, or a
loss. The host never waits for the device within a pass: results, losses and statistics stay there.

Several roles may stand on one trunk (`model.lora`): a model's chunks are what differs, and each selects its adapter
when a pass enters it. The callback chooses the heads, so one pass can be read by several.

A loss returns (sum, count, stats), and `calculate_per_token_loss` divides the gradient of all sums by all counts. So
the gradient does not depend on how a minibatch is divided into micro-batches, up to rounding.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import tee
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icegrt.config import OptimizerConfig
from icegrt.distributed.pipeline import all_ranks_true, broadcast_from_last_stage
from icegrt.errors import RunError
from icegrt.model.architecture import DTYPES
from icegrt.model.hf.writer import save_pretrained
from icegrt.model.lora.model import AdaptedModel
from icegrt.model.lora.writer import save_adapter
from icegrt.model.pipeline_model import PipelineModel
from icegrt.packing import PackedBatch
from icegrt.residency import GRADIENTS, KINDS, PARAMETERS, Placement
from icegrt.roles.micro_batch import LossOutput, MicroBatch
from icegrt.roles.optimizer import make_optimizer, make_scheduler, wait_for_param_gather, wrap
from icegrt.roles.stage_shapes import known_shapes
from icegrt.utils.trace import trace_range


@dataclass(frozen=True)
class StepOutcome:
    """The result of an optimizer step.

    Attributes:
        stats: statistics of this pipeline's micro-batches, in order, on the device of its last stage; other stages
            have none. `distributed.pipeline.fetch_from_last_stage` brings them to the hosts of all stages.
        grad_norm: before clipping; NaN if the step was skipped.
        lr: the learning rate of the step.
        skipped: a loss or gradient was not finite, and no weight changed.
    """

    stats: list[Any]
    grad_norm: float
    lr: float
    skipped: bool


class Role:
    """A frozen model: reference, reward model, or any model that is only read.

    All ranks call the same methods, each with the batches of its data-parallel rank. Callbacks run on the last pipeline
    stage alone, which has the head; their results are broadcast to the other stages.

    Parameters with `requires_grad` train; a role does not change that, because several roles may share a model.

    Attributes:
        placement: which of the role's state is on the device. Passes, steps and exports hold what they need.
    """

    learns = False

    def __init__(self, name: str, model: PipelineModel) -> None:
        self.name = name
        self.model = model
        self.device = model.device
        self.placement = Placement(name)
        model.register_read_hook(partial(self.placement.require, PARAMETERS))
        model.train(self.learns)

    @property
    def weight_changes(self) -> int:
        """Number of changes of the weights that have begun; a failed run reads from it what is whole."""
        return self.model.weights_version

    @torch.no_grad()
    def score(
        self,
        batches: Sequence[PackedBatch],
        read: Callable[[Tensor, Any], tuple[Tensor, ...]],
        sizes: Callable[[Any], tuple[int, ...]],
    ) -> list[tuple[Tensor, ...]]:
        """Run forward passes without gradients.

        Args:
            batches: micro-batches on the CPU.
            read: `read(hidden_TH, batch)` returns as many vectors for each batch.
            sizes: `sizes(batch)` returns the number of entries of each of them.

        Returns:
            What `read` returned, in order, as fp32 on the device of every rank of the pipeline.
        """

        def collect(vectors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(x.float() for x in vectors)

        work = [(batch, read) for batch in batches]
        with trace_range(f"forward: {self.name}"), self.placement.hold_for_pass():
            rows = self._run(self.model.chunks, work, collect, forward_only=True, collect_non_loss_data=True)
        return broadcast_from_last_stage(rows, [sizes(batch) for batch in batches], self.device)

    def save_pretrained(
        self,
        out: str | Path,
        dtype: str,
        tokenizer: Any = None,
        extra_files: dict[str, Any] | None = None,
        *,
        replace: bool = False,
    ) -> Path:
        """Write the model as a Hugging Face checkpoint in `dtype`; arguments as in `model.hf.writer`. Collective.

        Raises:
            RunError: a weight is not finite.
        """
        if not all_ranks_true(weights_are_finite(self)):
            raise RunError(
                f"{out}: not written, because weights of the {self.name} are not finite; lower its learning rate, and "
                "start a new run"
            )
        with self.placement.hold(PARAMETERS):
            return save_pretrained(
                self.model.export_tensors(DTYPES[dtype]),
                self.model.architecture,
                out,
                classifier=self.model.head_kind == "scalar",
                dtype=dtype,
                tokenizer=tokenizer,
                extra_files=extra_files,
                replace=replace,
            )

    def save_adapter(
        self, out: str | Path, extra_files: dict[str, Any] | None = None, *, replace: bool = False
    ) -> Path:
        """Write the adapter of a role with an `AdaptedModel`, as `model.lora.writer` does. Collective."""
        assert isinstance(self.model, AdaptedModel)
        with self.placement.hold(PARAMETERS):
            return save_adapter(self.model, out, extra_files, replace=replace)

    def _run(
        self,
        chunks: Sequence[Any],
        work: Sequence[tuple[PackedBatch, Callable[[Tensor, Any], Any]]],
        collect: Callable[[Any], tuple],
        **options: bool,
    ) -> list[Any]:
        """Run all (batch, callback) pairs through `chunks`; returns `collect(callback(...))` of the last stage."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        def forward(iterator: Iterator, chunk: Any):
            batch, callback = next(iterator)

            def on_output(hidden_T1H: Tensor, non_loss_data: bool = False) -> tuple:
                return collect(callback(self.model.gather_hidden_rows(hidden_T1H), batch))

            return getattr(chunk, "module", chunk).hidden(batch), on_output

        # Virtual stages read the same micro-batches, each at its own pace: `tee` keeps those that one has yet to read.
        on_device = ((batch.to(self.device, non_blocking=True), callback) for batch, callback in work)
        iterators = list(tee(_one_ahead(on_device), len(chunks)))
        return get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=list(chunks),
            num_microbatches=len(work),
            seq_length=max(batch.tokens_T.numel() for batch, _ in work),
            micro_batch_size=1,
            **known_shapes([batch for batch, _ in work], self.model.config),
            **options,
        )


def _one_ahead(items: Iterable[Any]) -> Iterator[Any]:
    """Yield each item when the one after it exists already: its copy to the device then overlaps with a computation."""
    ahead: list[Any] = []
    for item in items:
        yield from ahead
        ahead = [item]
    yield from ahead


def weights_are_finite(role: Role) -> bool:
    """Return whether all weights that this rank holds are finite."""
    with role.placement.hold(PARAMETERS):
        flags = [torch.isfinite(parameter).all() for parameter in role.model.parameters()]
    return bool(torch.stack(flags).all()) if flags else True


def check_inference_mode() -> None:
    """Raise `RunError` in `torch.inference_mode`, whose tensors cannot enter a backward pass."""
    if torch.is_inference_mode_enabled():
        raise RunError(
            "torch.inference_mode is on, so nothing can be trained; leave it before training, also in reward functions"
        )


class TrainableRole(Role):
    """A model that is trained: with gradients, a distributed optimizer and a learning-rate schedule from Megatron.

    `train_step` takes a whole optimizer step. `zero_gradients` and `accumulate` are its first two parts, for callers
    that inspect gradients. All ranks call the methods together.

    Attributes:
        ddps: Megatron's data-parallel wrapper of each pipeline stage of this rank.
        optimizer: Adam; its state is sharded over data-parallel ranks.
        schedule: the learning rate by optimizer step.
    """

    learns = True

    @torch.enable_grad()
    def __init__(self, name: str, model: PipelineModel, config: OptimizerConfig, total_steps: int) -> None:
        """Wrap the parameters of `model` that train; the schedule runs over `total_steps` optimizer steps."""
        check_inference_mode()
        super().__init__(name, model)
        self.ddps = ddps = wrap(model)
        for ddp in ddps:
            # Megatron 0.16: autograd's nodes hold hooks that hold the DDP that holds the nodes, a cycle through C++
            # that Python's collector does not see -> models, gradients and process groups are never freed.
            # Clear the nodes when the role goes.
            weakref.finalize(self, ddp.grad_accs.clear)
        model.register_read_hook(partial(wait_for_param_gather, ddps))
        self.optimizer = make_optimizer(config, ddps, model.config)
        self.schedule = make_scheduler(config, self.optimizer, total_steps)

    def train_step(self, work: Sequence[MicroBatch], lr: float | None = None) -> StepOutcome:
        """Take one optimizer step along the gradient of (sum of all losses) / (sum of all counts).

        Args:
            work: micro-batches with their losses.
            lr: learning rate of this step, beside the schedule, which does not advance; None: that of the schedule.

        Raises:
            RunError: the caller or a reward function has left `torch.inference_mode` on. `torch.no_grad` has no effect.
        """
        check_inference_mode()
        with trace_range(f"train step: {self.name}"), self.placement.hold(*KINDS):
            self.zero_gradients()
            with trace_range(f"forward and backward: {self.name}"):
                stats, losses = self.accumulate(work)
            scheduled = [group["lr"] for group in self.optimizer.param_groups]
            step_lr = scheduled[0] if lr is None else lr
            if not all_ranks_true(self._is_finite(losses)):
                return StepOutcome(stats, math.nan, step_lr, skipped=True)
            self.model.mark_weights_changed()
            if lr is None:
                _, grad_norm, _ = self.optimizer.step()
                self.schedule.step(increment=1)
            else:
                self._set_learning_rates([lr] * len(scheduled))
                _, grad_norm, _ = self.optimizer.step()
                self._set_learning_rates(scheduled)
        return StepOutcome(stats, float(grad_norm or 0.0), step_lr, skipped=False)

    def _set_learning_rates(self, rates: Sequence[float]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def zero_gradients(self) -> None:
        """Set all gradients to zero."""
        with self.placement.hold(GRADIENTS):
            for ddp in self.ddps:
                ddp.zero_grad_buffer()
            self.optimizer.zero_grad()

    @torch.enable_grad()
    def accumulate(self, work: Sequence[MicroBatch]) -> tuple[list[Any], list[Tensor]]:
        """Run forward and backward over all micro-batches; gradients stay in the parameters' `main_grad`.

        With several data-parallel ranks `main_grad` is complete only in this rank's shard of the optimizer.

        Returns:
            The losses' statistics and the detached losses, on the device of the pipeline's last stage; other stages
            have none.
        """
        losses: list[Tensor] = []

        def collect(output: LossOutput) -> tuple[Tensor, Tensor, Any]:
            losses.append(output.sum.detach())
            return output.sum, torch.full((), output.count, dtype=torch.int, device=self.device), output.stats

        pairs = [(item.batch, item.loss) for item in work]
        with self.placement.hold(PARAMETERS, GRADIENTS):
            stats = self._run(self.ddps, pairs, collect, forward_only=False)
        return stats, losses

    def _is_finite(self, losses: Sequence[Tensor]) -> bool | Tensor:
        """Return whether losses and gradients of this rank are finite, 0-dim bool on the device."""
        # A loss may overflow while its gradient does not, and the reverse.
        sums = [buffer.grad_data.sum() for ddp in self.ddps for buffer in ddp.buffers]
        numbers = [x.double() for x in (*losses, *sums)]
        return torch.stack(numbers).isfinite().all() if numbers else True
