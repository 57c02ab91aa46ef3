"""From the environment to process groups: torchrun's variables (or one process alone) -> Megatron's parallel_state.

`Cluster.open()` may be called by several trainers of one process: they share it, and the last `close()` takes the
process groups and the CPU supplies down again.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from icegrt.distributed import cpu_backend as cpu
from icegrt.distributed import failure
from icegrt.distributed.layout import Layout, check_world_size
from icegrt.distributed.megatron import hide_megatron_warnings
from icegrt.errors import ConfigError, RunError
from icegrt.packing import Share

# Rank 0 may write a large model or ask a slow reward function while the others wait.
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=2)
_FAREWELL_S = 2.0
_openings = count()


@dataclass
class Cluster:
    """This process's place among all: rank, device, and the data-parallel group."""

    layout: Layout
    rank: int
    world_size: int
    device: torch.device
    _stack: contextlib.ExitStack = field(repr=False)
    _users: int = 1

    _current = None

    @classmethod
    def open(cls, layout: Layout | None = None) -> Cluster:
        """Join (or start) the process groups.

        layout: None takes the one that is open already, or no cut at all. Raises `ConfigError` when the world size
        does not fit it or nothing says where the ranks meet, `RunError` when another layout is open.
        """
        if cls._current is not None:
            if layout is not None and cls._current.layout != layout:
                raise RunError(f"this process already runs {cls._current.layout}; close it before opening {layout}")
            cls._current._users += 1
            return cls._current
        cls._current = _start(layout or Layout())
        return cls._current

    @classmethod
    def current(cls) -> Cluster:
        """The cluster that is open."""
        assert cls._current is not None, "no cluster is open"
        return cls._current

    def close(self) -> None:
        """Leave; the last user takes the process groups down."""
        self._users -= 1
        error = sys.exc_info()[1]
        if isinstance(error, Exception):
            failure.should_report(error)  # said before the connections close, and with them the other ranks' calls fail
        if self._users == 0:
            Cluster._current = None
            if isinstance(error, Exception) and self.world_size > 1:
                _for_a_while(self._stack.close)
            else:
                self._stack.close()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0: the one that writes files and speaks to people."""
        return self.rank == 0

    @property
    def data_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same parameters and see different sequences (context parallelism included)."""
        from megatron.core import parallel_state

        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    @property
    def model_group(self) -> dist.ProcessGroup:
        """Ranks that hold one model together and see the same sequences."""
        from megatron.core import parallel_state

        return parallel_state.get_model_parallel_group()

    @property
    def share(self) -> Share:
        """What of a plan over all ranks falls to this one, and how its micro-batches must be cut."""
        layout = self.layout
        return Share(
            ranks=dist.get_world_size(self.data_group),
            rank=dist.get_rank(self.data_group),
            round_to=layout.pipeline if layout.virtual_pipeline > 1 else 1,
            tail_multiple=layout.tensor if layout.sequence_parallel else 1,
        )

    # -- small collectives over CPU tensors and plain values -------------------------------------------------------

    def gather(self, x: Tensor) -> list[Tensor]:
        """Every data-parallel rank's `x` ([n, ...] on the CPU; n may differ), in the order of ranks."""
        ranks = dist.get_world_size(self.data_group)
        if ranks == 1:
            return [x]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks)]
        dist.all_gather(sizes, torch.tensor([x.shape[0]]), group=self.data_group)
        counts = [int(size) for size in sizes]
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: x.shape[0]] = x
        parts = [torch.empty_like(padded) for _ in range(ranks)]
        dist.all_gather(parts, padded, group=self.data_group)
        return [part[:count] for part, count in zip(parts, counts, strict=True)]

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums of `values` over data-parallel ranks, in fp64."""
        sums = torch.tensor([float(v) for v in values], dtype=torch.float64)
        dist.all_reduce(sums, group=self.data_group)
        return sums.tolist()

    def any_rank(self, flags: Sequence[bool]) -> list[bool]:
        """Which of `flags` are set on any rank."""
        if self.world_size == 1:
            return list(flags)
        found = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in found]

    def gather_to_main(self, value: Any) -> list[Any]:
        """Every rank's `value` in the order of ranks, on rank 0; nothing elsewhere."""
        if self.world_size == 1:
            return [value]
        found = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, found)
        return found or []

    def broadcast_from_main(self, value: Any) -> Any:
        """Rank 0's `value` on every rank."""
        if self.world_size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def wait(self) -> None:
        """Until every rank has come here."""
        if self.world_size > 1:
            dist.all_reduce(torch.zeros(1))


def _start(layout: Layout) -> Cluster:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    check_world_size(layout, world_size)
    if world_size > 1 and "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            f"WORLD_SIZE announces {world_size} ranks, but MASTER_ADDR does not say where they meet. Start them with "
            f"torchrun --nproc-per-node {world_size} -m icegrt ..., or unset WORLD_SIZE to run alone"
        )
    with contextlib.ExitStack() as stack:
        hide_megatron_warnings()
        from megatron.core import parallel_state

        stack.enter_context(cpu.supplies())
        device = local_device()
        if not dist.is_initialized():
            _join(world_size, rank, device)
            stack.callback(dist.destroy_process_group)
        parallel_state.initialize_model_parallel(
            layout.tensor,
            layout.pipeline,
            layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
            create_gloo_process_groups=True,
            distributed_timeout_minutes=int(COLLECTIVE_TIMEOUT.total_seconds() // 60),
        )
        stack.callback(_leave_model_parallel)
        _seed_trackers(device)
        kept = stack.pop_all()
    return Cluster(layout, rank, world_size, device, kept)


def _for_a_while(leave: Callable[[], None]) -> None:
    # NCCL waits for what it has begun, and others may be gone: what failed must be told before somebody ends us.
    def quietly() -> None:
        with contextlib.suppress(Exception):
            leave()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(_FAREWELL_S)


def _leave_model_parallel() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    # Some it forgets; and a group that anyone holds keeps its threads, of which gloo's never sleep for long.
    for name, value in vars(parallel_state).items():
        if isinstance(value, dist.ProcessGroup):
            setattr(parallel_state, name, None)


def _seed_trackers(device: torch.device) -> None:
    # Nothing here draws from Megatron's generators (dropout is off), but under sequence parallelism its layers ask for
    # them by name.
    if device.type == "cuda":
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(0)


def local_device() -> torch.device:
    """Select and return this rank's device, the GPU of its LOCAL_RANK. Raise `ConfigError` if there are too few."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    place, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= found:
        ranks = os.environ.get("LOCAL_WORLD_SIZE", f"more than {place}")
        raise ConfigError(
            f"torchrun started {ranks} ranks on this machine, which shows {found} GPU{'s' * (found > 1)}: give it "
            f"--nproc-per-node {found}, or make more visible (CUDA_VISIBLE_DEVICES)"
        )
    device = torch.device("cuda", place)
    torch.cuda.set_device(device)
    return device


def _join(world_size: int, rank: int, device: torch.device) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "MASTER_ADDR" in os.environ:
        # Each opening under a name of its own: ranks of a second one would otherwise meet at the first one's addresses.
        # torchrun keeps its store when it starts ranks again, and with it what those before them have left there.
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"icegrt/{again}/{world_size}/{next(_openings)}", failure.rendezvous_store())
    else:  # one process that nobody launched: no port is needed
        store = dist.HashStore()
    dist.init_process_group(backend, store=store, world_size=world_size, rank=rank, timeout=COLLECTIVE_TIMEOUT)
