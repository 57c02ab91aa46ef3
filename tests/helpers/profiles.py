"""The allocations of a run as torch's profiler records them."""

import contextlib
import time
from unittest import mock

import torch.distributed as dist

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "gather")


@contextlib.contextmanager
def released_by_gloo():
    """Give gloo's thread the time to release a collective's tensors: it holds them until after the call returns."""

    def patient(collective):
        def call(*args, **kwargs):
            work = collective(*args, **kwargs)
            time.sleep(0.002)
            return work

        return call

    with contextlib.ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(mock.patch.object(dist, name, patient(getattr(dist, name))))
        yield


def profiled_peak(profile):
    """The largest sum of live allocations that the profiler saw."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak
