"""The memory of a decoder: KV cache, activations, outputs and step arrays, allocated together and freed together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from icegrt.kernels.common.collectives import communication_device
from icegrt.kernels.dispatch import played_kind
from icegrt.model.pipeline_model import PipelineModel
from icegrt.rollout.graphs import StepGraphs, batch_buckets
from icegrt.rollout.memory import cache_bytes
from icegrt.rollout.micro_group import MicroGroup
from icegrt.rollout.model_runner import ModelRunner, OutputBuffers
from icegrt.rollout.paged_cache import PagedCache, block_bytes
from icegrt.rollout.pipeline import PipelineChannel
from icegrt.rollout.settings import RolloutSettings
from icegrt.rollout.stage import Activations, DecodeStage, StageShape
from icegrt.rollout.weights import StageWeights
from icegrt.scheduling import BlockScheduler


@dataclass(frozen=True, eq=False)
class DecoderStorage:
    """What a decoder allocates.

    Attributes:
        groups: micro-groups, one for each pipeline rank.
        runner: runs their steps.
        n_blocks: blocks of each group.
        block_bytes: bytes of a block on this rank.
        is_limited: whether memory limits the number of blocks, and not what the requests need.
    """

    groups: list[MicroGroup]
    runner: ModelRunner
    n_blocks: int
    block_bytes: int
    is_limited: bool

    def refresh_weights(self) -> None:
        """Read again what the stages do not read in place, after a change of the weights."""
        for stage in self.groups[0].stages:  # groups share the weights
            stage.weights.refresh()

    @property
    def summary(self) -> str:
        """The size of the KV cache, as a line of text."""
        blocks = self.n_blocks * len(self.groups)
        block_size = self.groups[0].scheduler.block_size
        why = "all that rollout.kv_memory allows" if self.is_limited else "as many as the requests need"
        return (
            f"KV cache: {blocks * block_size:,} tokens in {blocks:,} blocks, "
            f"{blocks * self.block_bytes / 2**30:.2f} GiB on each rank, {why}"
        )

    @classmethod
    @torch.no_grad()
    def allocate(
        cls,
        model: PipelineModel,
        settings: RolloutSettings,
        blocks_wanted: int,
        schedulers: Sequence[BlockScheduler] = (),
    ) -> DecoderStorage:
        """Allocate. Collective over the ranks of a model.

        Args:
            model: this rank's stages.
            settings: sizes.
            blocks_wanted: blocks of each group that the requests can use; memory may allow fewer.
            schedulers: of the groups, with sequences that wait; empty: new ones.
        """
        channel = PipelineChannel(model.cluster.pipeline_return_group)
        shape = stage_shape(model)
        stages = [StageWeights.of(chunk) for chunk in model.chunks]
        dtype, device = stages[0].layers[0].qkv.dtype, model.device
        size = block_bytes(len(model.layer_indices), settings.block_size, shape, dtype)
        # 1. Blocks: what memory allows on the rank with the least.
        per_group = -(-settings.max_batch // channel.stages)
        if schedulers:
            n_blocks, is_limited = schedulers[0].n_blocks, True
        else:
            affordable = cache_bytes(settings.kv_memory, device) // size // channel.stages
            affordable = _least_of_model(affordable, device)
            is_limited = affordable < blocks_wanted
            n_blocks = max(1, min(affordable, blocks_wanted))
        max_rows = max(settings.token_budget, per_group)
        # 2. The cache and its schedulers.
        cache = PagedCache(
            len(model.layer_indices), n_blocks * channel.stages, settings.block_size, shape, dtype, device
        )
        schedulers = schedulers or [
            BlockScheduler(
                n_blocks,
                settings.block_size,
                max_sequences=per_group,
                max_length=model.architecture.context_length,
                token_budget=max_rows,
                order=settings.order,
                reuse_prefixes=settings.reuse_prefixes,
            )
            for _ in range(channel.stages)
        ]
        # 3. Groups over parts of the cache.
        on_gpu = played_kind(device.type) == "cuda"
        lookahead = int(on_gpu) if settings.lookahead is None else settings.lookahead
        lookahead = lookahead if channel.stages == 1 else 0
        groups = []
        for number, scheduler in enumerate(schedulers):
            blocks, keys, values = cache.part(number * n_blocks, n_blocks)
            groups.append(
                MicroGroup(
                    scheduler,
                    blocks,
                    _stages(stages, shape, keys, values),
                    max_sequences=per_group,
                    max_rows=max_rows,
                    buckets=batch_buckets(per_group) if on_gpu else [],
                    lookahead=lookahead,
                )
            )
        # 4. Activations that all groups share.
        output = None
        if stages[-1].head is not None:
            vocab_rows = stages[-1].head.shape[0]
            output = OutputBuffers.allocate(per_group, shape.hidden_size, vocab_rows, dtype, device)
        graphs = StepGraphs() if settings.cuda_graphs and device.type == "cuda" else None
        activations = Activations(shape, max_rows, dtype, device)
        runner = ModelRunner(activations, output, channel, graphs, model.vocab_shard if output else None)
        return cls(groups, runner, n_blocks, size, is_limited)


def stage_shape(model: PipelineModel) -> StageShape:
    """Return the sizes of this rank's stages."""
    config, ranks = model.config, model.config.tensor_model_parallel_size
    group = None
    start = 0
    if ranks > 1:
        from megatron.core import parallel_state

        group = parallel_state.get_tensor_model_parallel_group()
        start = dist.get_rank(group) * model.chunks[0].vocab_rows
    return StageShape(
        config.hidden_size,
        config.num_attention_heads // ranks,
        config.num_query_groups // ranks,
        config.kv_channels,
        config.ffn_hidden_size // ranks,
        group,
        start,
        0 if model.adapter is None else model.adapter.widest,
    )


def _stages(stages: list[StageWeights], shape: StageShape, keys: list, values: list) -> list[DecodeStage]:
    parts, first = [], 0
    for weights in stages:
        last = first + len(weights.layers)
        parts.append(DecodeStage(weights, shape, keys[first:last], values[first:last]))
        first = last
    return parts


def _least_of_model(value: int, device: torch.device) -> int:
    """Return the least value of all ranks that hold the model together."""
    from megatron.core import parallel_state

    # Groups that decoding uses anyway: another one would open connections of its own.
    groups = (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
    )
    for group in groups:
        if dist.get_world_size(group) > 1:
            least = torch.tensor(value, dtype=torch.int64, device=communication_device(group, device))
            dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
            value = int(least)
    return value
