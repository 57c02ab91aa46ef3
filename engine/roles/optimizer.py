"""Megatron's DDP wrapper, optimizer and learning-rate schedule of a role."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from icegrt.config import OptimizerConfig
from icegrt.model.pipeline_model import PipelineModel
from icegrt.residency import HostMemory
from icegrt.roles.host_adam import move_to_host


def wrap(model: PipelineModel, *, overlap: bool | None = None, bucket_size: int | None = None) -> list[Any]:
    """Wrap every chunk in Megatron's DDP: fp32 gradients, reduce-scattered into the distributed optimizer's shards.

    Parameters with `requires_grad` are trained. What Megatron's schedules call in a training pass is in the wrappers'
    own copy of the configuration, so that several roles may train parts of one model.

    Args:
        model: the chunks of this rank.
        overlap: reduce gradients during the backward pass and gather parameters during the next forward pass. None:
            on a GPU.
        bucket_size: parameters per bucket when they overlap. None: Megatron's default.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    overlap = next(model.parameters()).is_cuda if overlap is None else overlap
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        bucket_size=bucket_size,
    )
    config = copy.copy(model.config)
    config.finalize_model_grads_func = finalize_gradients
    # Only the first chunk has buckets: the reductions of later chunks overlap with the backward pass of earlier ones.
    ddps = [
        DistributedDataParallel(config, dataclasses.replace(ddp_config), chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(model.chunks)
    ]
    if overlap:
        for ddp in ddps:
            _chain_gathers_in_order_of_use(ddp)
        syncs = [ddp.no_sync for ddp in ddps]
        config.no_sync_func = syncs if len(ddps) > 1 else syncs[0]
    return ddps


def _chain_gathers_in_order_of_use(ddp: Any) -> None:
    """Let the wait for a bucket begin the gather of the bucket that the forward pass reads next."""
    # Megatron 0.16: the chain follows the buffers, where an attention's output projection precedes its fused one, and
    # parameters of another dtype form a part of their own -> some gathers begin when they are waited for, with a
    # warning. We chain by the order of use. Buffers, gradients and optimizer states stay as they are.
    parameters = dict(ddp.module.named_parameters())
    names, attention = list(parameters), ".self_attention."
    last = {name.partition(attention)[0]: index for index, name in enumerate(names) if attention in name}

    def use(index: int) -> tuple[int, int]:
        layer, _, inner = names[index].partition(attention)
        return (last[layer], 1) if inner.startswith("linear_proj.") else (index, 0)

    in_order = (parameters[names[index]] for index in sorted(range(len(names)), key=use))
    groups = list(dict.fromkeys(ddp.param_to_bucket_group[p] for p in in_order if p in ddp.param_to_bucket_group))
    for group, following in zip(groups, [*groups[1:], None], strict=True):
        group.next_param_gather_bucket_group = following


def wait_for_param_gather(ddps: list[Any]) -> None:
    """Wait for the overlapped parameter all-gather. Call before reading parameters outside a forward pass."""
    for ddp in ddps:
        if ddp.ddp_config.overlap_param_gather:
            ddp.start_param_sync(force_sync=True)


def make_optimizer(config: OptimizerConfig, ddps: list[Any], model_config: Any) -> Any:
    """Return Megatron's distributed AdamW over the parameters of all `ddps`.

    Raises:
        RunError: the host has too little memory for the optimizer's state.
    """
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer

    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.lr * config.min_lr_fraction,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=model_config.bf16,
        params_dtype=model_config.params_dtype,
        use_distributed_optimizer=True,
    )
    # On a GPU there is no gloo group; checkpoints gather states over NCCL.
    gloo = not next(ddps[0].parameters()).is_cuda
    optimizer = get_megatron_optimizer(settings, list(ddps), use_gloo_process_groups=gloo)
    host = HostMemory(next(ddps[0].parameters()).device)
    for inner in inner_optimizers(optimizer):
        _index_as_ordered(inner)
        if config.on_host:
            move_to_host(inner, host)
        else:
            _use_multi_tensor_kernels(inner)
    if is_torch_adam(optimizer):
        # Megatron 0.16: without Transformer Engine and apex the norm of every single gradient is read on the host -> a
        # wait per parameter. Ours is read once.
        optimizer.get_grad_norm = partial(grad_norm, optimizer)
    return optimizer


def is_torch_adam(optimizer: Any) -> bool:
    """Return whether Megatron fell back to torch's Adam, because neither Transformer Engine nor apex is installed."""
    return all(isinstance(inner.optimizer, torch.optim.Adam) for inner in inner_optimizers(optimizer))


def _use_multi_tensor_kernels(optimizer: Any) -> None:
    # torch chooses them by itself on CUDA. Named here, they are also what a rehearsal of a GPU counts.
    adam = optimizer.optimizer
    if isinstance(adam, torch.optim.Adam):
        for group in adam.param_groups:
            group["foreach"] = any(parameter.device.type != "cpu" for parameter in group["params"]) or None


@torch.no_grad()
def grad_norm(optimizer: Any) -> float:
    """Return the norm of all ranks' gradients. Collective; the host waits for the device once.

    norm = sqrt(sum over ranks of (norm of the norms of a rank's gradients)^2)
    """
    grads = [grad for inner in inner_optimizers(optimizer) for grad in inner.get_main_grads_for_grad_norm()]
    total = torch.zeros(1, device=_device_of(optimizer))
    if grads:
        total += torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))) ** 2.0
    dist.all_reduce(total, group=optimizer.get_grad_stats_parallel_group())
    return float(total.item() ** 0.5)


def _device_of(optimizer: Any) -> torch.device:
    return inner_optimizers(optimizer)[0].buffers[0].grad_data.device


def finalize_gradients(model: list[Any], num_tokens: Tensor, **options: Any) -> None:
    """Sum the gradients over ranks and divide them by the number of entries that count over all ranks. Collective.

    Megatron's schedules call it after the last micro-batch.

    Args:
        model: the DDP wrappers of this rank's stages.
        num_tokens: 0-dim int, this pipeline's number on its last stage; 0 on other stages.
        options: of Megatron's `finalize_model_grads`.
    """
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads

    finalize_model_grads(model, None, **options)
    # Megatron 0.16: reads the number on the host to skip a division by 0 -> a wait. We divide by 1 then.
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast(num_tokens, dist.get_process_group_ranks(pipeline)[-1], group=pipeline)
    dist.all_reduce(num_tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    for ddp in model:
        ddp.scale_gradients(1.0 / num_tokens.clamp(min=1))


def inner_optimizers(optimizer: Any) -> list[Any]:
    """Return the optimizers that Megatron has chained together; a list of one if there is no chain."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _index_as_ordered(optimizer: Any) -> None:
    # Megatron 0.16: checkpoints find a parameter's state by its index in the group; indices count buffer order, but
    # the group lists fp32 parameters first -> beside bf16 ones the scalar head gets another parameter's state.
    # Number the parameters in the order of the group.
    groups = zip(optimizer.model_fp32_groups, optimizer.model_float16_groups, strict=True)
    for group, (fp32, float16) in enumerate(groups):
        for order, parameter in enumerate((*fp32, *float16)):
            optimizer.model_param_group_index_map[parameter] = (group, order)


def make_scheduler(config: OptimizerConfig, optimizer: Any, total_steps: int) -> Any:
    """Return Megatron's learning-rate schedule over `total_steps` optimizer steps."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    warmup = min(int(config.warmup_fraction * total_steps), total_steps - 1)
    return OptimizerParamScheduler(
        optimizer,
        # The first warm-up step has a rate of lr / (warmup + 1) already, not 0.
        init_lr=config.lr / (warmup + 1) if warmup else 0.0,
        max_lr=config.lr,
        min_lr=config.lr * config.min_lr_fraction,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(total_steps, 1),
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
        # A checkpoint restores the number of steps taken. The shape of the schedule comes from the configuration.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
