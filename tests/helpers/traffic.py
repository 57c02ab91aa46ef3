"""Bytes sent by collectives: counted by wrapping torch.distributed, and derived by the formulas of docs/scaling.md.

The counts are of all ranks together: 2 (R - 1) n for a ring all-reduce of n bytes over R ranks, (R - 1) n for a
reduce-scatter, an all-gather (n: the gathered tensor), a broadcast or a gather, and n for a point-to-point message.
"""

import contextlib
from collections import defaultdict
from dataclasses import dataclass

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from megatron.core import parallel_state
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.tensor_parallel import layers, mappings

FP32, INT64 = 4, 8


def size(x):
    return x.numel() * x.element_size()


# name: (bytes of a call, from its arguments; how often a rank of R sends them)
COUNTED = {
    "all_reduce": (lambda x, *a, **k: size(x), lambda ranks: 2 * (ranks - 1) / ranks),
    "all_gather": (lambda xs, *a, **k: sum(map(size, xs)), lambda ranks: (ranks - 1) / ranks),
    "all_gather_into_tensor": (lambda out, *a, **k: size(out), lambda ranks: (ranks - 1) / ranks),
    "reduce_scatter_tensor": (lambda out, x, *a, **k: size(x), lambda ranks: (ranks - 1) / ranks),
    "broadcast": (lambda x, *a, **k: size(x), lambda ranks: (ranks - 1) / ranks),
    "gather": (lambda x, *a, **k: size(x), lambda ranks: (ranks - 1) / ranks),
    "isend": (lambda *a, **k: size(k["tensor"] if "tensor" in k else a[0]), lambda ranks: 1),
    "send": (lambda x, *a, **k: size(x), lambda ranks: 1),
}
ALIASES = {"dist_all_gather_func": "all_gather_into_tensor", "dist_reduce_scatter_func": "reduce_scatter_tensor"}


@contextlib.contextmanager
def counted():
    """Yield the bytes that this rank sends inside the block, by dimension: tensor, pipeline, data, all."""
    sent_bytes, inside = defaultdict(float), []
    originals = []

    def wrap(name, original):
        amount, share = COUNTED[name]

        def call(*args, **kwargs):
            if not inside:
                group = kwargs.get("group")
                if group is None:
                    group = next((a for a in args if isinstance(a, dist.ProcessGroup)), dist.group.WORLD)
                ranks = dist.get_world_size(group)
                dimension_name = "pipeline" if name in ("isend", "send") else dimension(group)
                if ranks > 1:
                    sent_bytes[dimension_name] += amount(*args, **kwargs) * share(ranks)
            inside.append(name)
            try:
                return original(*args, **kwargs)
            finally:
                inside.pop()

        return call

    wrapped = {name: wrap(name, getattr(c10d, name)) for name in COUNTED}
    patches = [(module, name, wrapped[name]) for name in COUNTED for module in (dist, c10d)]
    patches += [
        (module, alias, wrapped[name])
        for module in (layers, mappings, param_and_grad_buffer)
        for alias, name in ALIASES.items()
        if hasattr(module, alias)
    ]
    for module, name, function in patches:
        originals.append((module, name, getattr(module, name)))
        setattr(module, name, function)
    try:
        yield sent_bytes
    finally:
        for module, name, function in reversed(originals):
            setattr(module, name, function)


def dimension(group):
    ranks = dist.get_process_group_ranks(group)
    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "data": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    return next((n for n, g in groups.items() if dist.get_process_group_ranks(g) == ranks), "all")


@dataclass
class Work:
    """Amounts of one iteration, summed over data-parallel ranks.

    tokens, actions: T and A of the experience, with alignment tails. sequences: of the rollout. rollout_rows: rows that
    pass through the trunk while decoding. rollout_draws: sampled tokens.
    """

    tokens: int
    actions: int
    sequences: int
    rollout_rows: int
    rollout_draws: int


def derived(layout, work, *, layers, hidden, parameters, epochs, steps, roles=4):
    """Return the bytes of one PPO iteration by dimension, in fp32, without ptx and with one chunk per micro-batch."""
    tp, pp, dp = layout["tensor"], layout["pipeline"], layout["data"]
    row = hidden * FP32
    forward = (roles + 2 * epochs) * work.tokens  # scoring, and the update of actor and critic
    forwarded, backward = forward + work.rollout_rows, 2 * epochs * work.tokens
    sent = {}
    if tp > 1:
        rows = 2 * (2 * layers + 1) * forwarded + 4 * layers * backward
        if layout["sequence_parallel"]:
            rows += 2 * layers * backward + backward
        head = 2 * epochs * work.actions * row
        statistics = 4 * tp * FP32 * ((2 + epochs) * work.actions + work.rollout_draws)
        draws = (FP32 + INT64) * tp * work.rollout_draws
        sent["tensor"] = (tp - 1) * (rows * row + head + statistics + draws)
    if pp > 1:
        boundaries = pp * layout["virtual_pipeline"] - 1
        values = FP32 * (4 * work.actions + 2 * work.sequences)
        sent["pipeline"] = boundaries * (forwarded + backward) * row + (pp - 1) * (8 * work.rollout_draws + values)
    if dp > 1:
        exchanged = 8 * work.rollout_draws + 16 * work.sequences
        sent["data"] = (dp - 1) * (2 * steps * parameters * (FP32 + FP32) + exchanged)
    return sent
