"""Megatron's DDP wrapper, optimizer and learning-rate schedule of a role."""

from __future__ import annotations

import dataclasses
from typing import Any

from icegrt.config import OptimizerConfig
from icegrt.model.pipeline_model import PipelineModel


def wrap(model: PipelineModel, *, overlap: bool | None = None, bucket_size: int | None = None) -> list:
    """Megatron's DDP around every chunk: fp32 gradients, reduce-scattered into the distributed optimizer's shares.

    overlap: the reduction with the backward pass, and gathering parameters with the next forward pass (None: on a GPU).
    bucket_size: parameters that travel together where they overlap (None: as many as Megatron thinks best).
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    overlap = next(model.parameters()).is_cuda if overlap is None else overlap
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        bucket_size=bucket_size,
    )
    # Only the first chunk is cut into buckets: the later ones' reductions hide behind the earlier ones' backward.
    ddps = [
        DistributedDataParallel(model.config, dataclasses.replace(config), chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(model.chunks)
    ]
    if overlap:
        syncs = [ddp.no_sync for ddp in ddps]
        model.config.no_sync_func = syncs if len(ddps) > 1 else syncs[0]
    return ddps


def wait_for_param_gather(ddps: list) -> None:
    """Gather the parameters that the last optimizer step changed, where the next forward pass was to do so."""
    for ddp in ddps:
        if ddp.ddp_config.overlap_param_gather:
            ddp.start_param_sync(force_sync=True)


def make_optimizer(config: OptimizerConfig, ddps, model_config):
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
    optimizer = get_megatron_optimizer(settings, list(ddps))
    for inner in inner_optimizers(optimizer):
        _index_as_ordered(inner)
    return optimizer


def inner_optimizers(optimizer) -> list[Any]:
    """Return the optimizers that Megatron has chained together; a list of one if there is no chain."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _index_as_ordered(optimizer) -> None:
    # Checkpoints look a parameter's state up by its place in the group. Megatron numbers the places in buffer order and
    # then puts fp32 parameters first: beside bf16 ones the scalar head would be given another parameter's state.
    groups = zip(optimizer.model_fp32_groups, optimizer.model_float16_groups, strict=True)
    for group, (fp32, float16) in enumerate(groups):
        for order, parameter in enumerate((*fp32, *float16)):
            optimizer.model_param_group_index_map[parameter] = (group, order)


def make_scheduler(config: OptimizerConfig, optimizer, total_steps: int):
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    warmup = min(int(config.warmup_fraction * total_steps), total_steps - 1)
    return OptimizerParamScheduler(
        optimizer,
        # The first step of a warm-up moves already, by the first rung of the ladder.
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
        # A checkpoint says how many steps were taken; over how many the rate falls, and from where, the configuration.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
