"""The allocations of a run as torch's profiler records them."""

import contextlib
import sys
import time
import types
from unittest import mock

import torch
import torch.distributed as dist
from torch._C._profiler import _EventType
from torch.utils._pytree import tree_leaves

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "gather")


RELEASE_SECONDS = 10.0


ASYNC_SECONDS = 0.01


class _Work:
    """A collective's handle. After its `wait` gloo has had time to release the tensors.

    Between call and `wait` the computation may take references of its own, so they cannot be counted.
    """

    def __init__(self, work):
        self._work = work

    def wait(self, *args):
        self._work.wait(*args)
        self._work = None  # holds them, too
        time.sleep(ASYNC_SECONDS)


@contextlib.contextmanager
def released_by_gloo():
    """Let collectives be complete when gloo's thread has released their tensors: it holds them for longer.

    A tensor whose last reference the thread drops is freed where no profiler sees it.
    """

    def patient(collective):
        def call(*args, **kwargs):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            counts = [x._use_count() for x in tensors]
            work = collective(*args, **kwargs)
            if work is not None:
                return _Work(work)
            deadline = time.perf_counter() + RELEASE_SECONDS
            while any(x._use_count() > n for x, n in zip(tensors, counts, strict=True)):
                assert time.perf_counter() < deadline, "gloo does not release its tensors"
                time.sleep(1e-4)
            return None

        return call

    collectives = {getattr(dist, name): patient(getattr(dist, name)) for name in COLLECTIVES}
    # Megatron's modules, if they are loaded, have names of their own for some collectives.
    modules = [dist, *(module for name, module in sys.modules.items() if name.startswith("megatron.core."))]
    with contextlib.ExitStack() as stack:
        for module in modules:
            for name, value in list(vars(module).items()):
                if type(value) is types.FunctionType and value in collectives:
                    stack.enter_context(mock.patch.object(module, name, collectives[value]))
        yield


def profiled_peak(profile):
    """The largest sum of live allocations that the profiler saw."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def peak_beside_gloo(profile):
    """The largest sum of live allocations, without those of gloo that its own threads free: no profiler sees that."""
    allocations = sorted(_allocations(profile.profiler.kineto_results.experimental_event_tree()))
    # 1. Pair each allocation with its end: a free, or the next allocation at its address.
    opened, changes = {}, []
    for time_ns, address, size, in_gloo in allocations:
        began = opened.pop(address, None)
        if began is not None and (size < 0 or not began[2]):
            changes += [(began[0], began[1]), (time_ns, -began[1])]
        if size > 0:
            opened[address] = (time_ns, size, in_gloo)
    changes += [(time_ns, size) for time_ns, size, in_gloo in opened.values() if not in_gloo]
    # 2. The largest sum.
    total = peak = 0
    for _, size in sorted(changes):
        total += size
        peak = max(peak, total)
    return peak


def _allocations(events, in_gloo=False):
    """Yield (time, address, bytes, whether a collective allocated it) of each allocation; a free has negative bytes."""
    for event in events:
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            yield event.start_time_ns, fields.ptr, fields.alloc_size, in_gloo
        yield from _allocations(event.children, in_gloo or event.name.startswith("c10d::"))
