"""Process groups from torchrun's variables, or for one process alone, in Megatron's parallel_state.

Several trainers of one process may call `Cluster.open()`: they share the cluster. The last `close()` destroys the
process groups and removes the CPU backend.
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

from icegrt.distributed import failure
from icegrt.distributed.control import Control
from icegrt.distributed.cpu_backend import cpu_backend
from icegrt.distributed.layout import Layout, check_world_size
from icegrt.distributed.megatron import load_megatron
from icegrt.distributed.monitor import HangMonitor
from icegrt.errors import ConfigError, RunError
from icegrt.kernels.dispatch import played_kind
from icegrt.packing import Share

# Of NCCL. Work of unknown length (files, reward functions, uneven rollouts) ends in a wait of `Control`, which has a
# limit of its own, before the next collective.
NCCL_TIMEOUT = datetime.timedelta(minutes=10)
# Of gloo, on the CPU, where a step may take long.
GLOO_TIMEOUT = datetime.timedelta(hours=2)
_CLOSE_TIMEOUT_S = 2.0
_opening_numbers = count()


@dataclass
class Cluster:
    """The process groups of a run, and this process's rank and device. Objects with collectives receive it.

    Attributes:
        layout: tensor, pipeline and virtual pipeline sizes.
        rank: global rank, from 0.
        world_size: number of ranks.
        device: this rank's device.
        pipeline_return_group: this rank's pipeline, for messages from a later to an earlier stage.
        control: messages between all ranks; None in a process alone.
        monitor: names a rank that hangs; None in a process alone.
    """

    layout: Layout
    rank: int
    world_size: int
    device: torch.device
    pipeline_return_group: dist.ProcessGroup = field(repr=False)
    control: Control | None = field(repr=False)
    monitor: HangMonitor | None = field(repr=False)
    _stack: contextlib.ExitStack = field(repr=False)
    _users: int = 1

    _current = None

    @classmethod
    def open(cls, layout: Layout | None = None) -> Cluster:
        """Load Megatron-core and join the process groups, or share the cluster that is open in this process.

        Args:
            layout: None takes the layout that is open, or one rank per model.

        Raises:
            ConfigError: the layout does not divide the world size, or MASTER_ADDR is not set.
            RunError: a cluster of another layout is open.
        """
        if cls._current is not None:
            if layout is not None and cls._current.layout != layout:
                raise RunError(f"this process already runs {cls._current.layout}; close it before opening {layout}")
            cls._current._users += 1
            return cls._current
        cls._current = _start(layout or Layout())
        return cls._current

    def close(self, error: BaseException | None = None) -> None:
        """Release the cluster; the last user destroys the process groups.

        Args:
            error: the exception that ends the run on this rank; None for an orderly end. After an error other ranks
                may be gone, so the destruction is abandoned after two seconds.
        """
        self._users -= 1
        failed = isinstance(error, Exception)
        if failed:
            failure.should_report(error)  # recorded before connections close and collectives of other ranks fail
        if self._users == 0:
            Cluster._current = None
            if failed and self.world_size > 1:
                _run_with_timeout(self._stack.close)
            else:
                self._stack.close()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.close(error)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    @property
    def data_group(self) -> dist.ProcessGroup:
        """The ranks with the same parameters and different sequences (context parallelism included)."""
        from megatron.core import parallel_state

        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    @property
    def model_group(self) -> dist.ProcessGroup:
        """The ranks that hold one model together and receive the same sequences."""
        from megatron.core import parallel_state

        return parallel_state.get_model_parallel_group()

    @property
    def share(self) -> Share:
        """This data-parallel rank's share of a batch plan, and the constraints on its micro-batches."""
        layout = self.layout
        return Share(
            ranks=dist.get_world_size(self.data_group),
            rank=dist.get_rank(self.data_group),
            round_to=layout.pipeline if layout.virtual_pipeline > 1 else 1,
            tail_multiple=layout.tensor if layout.sequence_parallel else 1,
        )

    # -- small collectives of a data-parallel group, on the device that its group communicates on ------------------

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Return `x` of every data-parallel rank on the CPU, in the order of ranks. Collective.

        Args:
            x: [n, ...]; n may differ between ranks.
        """
        ranks = dist.get_world_size(self.data_group)
        if ranks == 1:
            return [x]
        # 1. Sizes, which the host waits for.
        sizes = torch.empty(ranks, dtype=torch.int64, device=self.device)
        dist.all_gather_into_tensor(sizes, torch.tensor([x.shape[0]], device=self.device), group=self.data_group)
        counts = sizes.tolist()
        # 2. Parts of the largest size in one tensor, and one copy of it to the host.
        padded = x.new_zeros(max(counts), *x.shape[1:], device=self.device)
        padded[: x.shape[0]] = x
        parts = padded.new_empty(ranks * padded.shape[0], *padded.shape[1:])
        dist.all_gather_into_tensor(parts, padded, group=self.data_group)
        on_host = parts.cpu().view(ranks, *padded.shape)
        return [part[:count] for part, count in zip(on_host, counts, strict=True)]

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums of `values` over data-parallel ranks, in fp64. Collective."""
        sums = torch.tensor([float(v) for v in values], dtype=torch.float64, device=self.device)
        dist.all_reduce(sums, group=self.data_group)
        return sums.tolist()

    # -- messages of all ranks, which wait for each other as long as it takes --------------------------------------

    def any_rank(self, flags: Sequence[bool]) -> list[bool]:
        """Return for each flag whether it is set on any rank. Collective over all ranks."""
        return list(flags) if self.control is None else self.control.any_rank(flags)

    def gather_to_main(self, value: Any) -> list[Any]:
        """Return `value` of every rank in the order of ranks, on rank 0; an empty list elsewhere. Collective."""
        return [value] if self.control is None else self.control.gather(value)

    def broadcast_from_main(self, value: Any) -> Any:
        """Return rank 0's `value` on every rank. Collective."""
        return value if self.control is None else self.control.broadcast(value)

    def barrier(self) -> None:
        """Wait until every rank has reached this call.

        Call it between work of unknown length and the next collective: NCCL gives up after `NCCL_TIMEOUT`.
        """
        if self.control is not None:
            self.control.any_rank()

    def enter_phase(self, name: str) -> None:
        """Name what the run does from now on, for the notice about a rank that hangs."""
        if self.monitor is not None:
            self.monitor.phase = name


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
        load_megatron()
        from megatron.core import parallel_state

        stack.enter_context(cpu_backend())
        device = local_device()
        store = _opening_store()
        on_gpu = played_kind(device.type) == "cuda"
        timeout = NCCL_TIMEOUT if on_gpu else GLOO_TIMEOUT
        if not dist.is_initialized():
            backend = "nccl" if on_gpu else "gloo"
            dist.init_process_group(backend, store=store, world_size=world_size, rank=rank, timeout=timeout)
            stack.callback(dist.destroy_process_group)
        parallel_state.initialize_model_parallel(
            layout.tensor,
            layout.pipeline,
            layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
            # On a GPU every group is NCCL's alone. A gloo group of W ranks opens W - 1 sockets per rank.
            create_gloo_process_groups=not on_gpu,
            distributed_timeout_minutes=int(timeout.total_seconds() // 60),
        )
        stack.callback(_destroy_model_parallel)
        _seed_trackers(device)
        return_group = parallel_state.get_pipeline_model_parallel_group()
        if on_gpu and layout.pipeline > 1:
            # NCCL serves the sends and receives of two ranks in one queue: each direction needs a group of its own.
            ranks = dist.get_process_group_ranks(return_group)
            return_group = dist.new_group(
                ranks, timeout=timeout, use_local_synchronization=True, group_desc="PIPELINE_RETURN_GROUP"
            )
        control = monitor = None
        if world_size > 1:
            control = Control(_connection(store, "control"), rank, world_size)
            monitor = HangMonitor(Control(_connection(store, "monitor"), rank, world_size), _print_notice)
            stack.callback(monitor.stop)
        cleanup = stack.pop_all()
    return Cluster(layout, rank, world_size, device, return_group, control, monitor, cleanup)


def _print_notice(text: str) -> None:
    # Any rank may print it, also when rank 0 is the one that hangs.
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _opening_store() -> dist.Store:
    """Return a store for this opening: torchrun's with a prefix, or a local one for a process alone."""
    if "MASTER_ADDR" not in os.environ:  # one process without a launcher needs no port
        return dist.HashStore()
    # Every opening has a prefix of its own: a second one would read the addresses of the first. torchrun keeps its
    # store, with the addresses of ended ranks, when it restarts ranks.
    restarts, world_size = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("WORLD_SIZE", "1")
    prefix = f"icegrt/{restarts}/{world_size}/{next(_opening_numbers)}"
    return dist.PrefixStore(prefix, failure.rendezvous_store())


def _connection(store: dist.Store, purpose: str) -> dist.Store:
    """Return a connection of its own to `store`: a wait would hold back other users of the same connection."""
    return dist.PrefixStore(purpose, store.clone())


def _run_with_timeout(cleanup: Callable[[], None]) -> None:
    # NCCL waits for unfinished collectives, and their peers may be gone. The error must be printed before torchrun
    # terminates this process.
    def suppressed() -> None:
        with contextlib.suppress(Exception):
            cleanup()

    thread = threading.Thread(target=suppressed, daemon=True)
    thread.start()
    thread.join(_CLOSE_TIMEOUT_S)


def _destroy_model_parallel() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    # Megatron 0.16: some groups stay in its module variables -> their gloo threads run on. We clear the variables.
    for name, value in vars(parallel_state).items():
        if isinstance(value, dist.ProcessGroup):
            setattr(parallel_state, name, None)


def _seed_trackers(device: torch.device) -> None:
    # Megatron 0.16: under sequence parallelism layers look up a generator by name, even with dropout off -> we seed it.
    if device.type == "cuda":
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(0)


def local_device() -> torch.device:
    """Select and return this rank's device: the GPU of its local rank, or the CPU.

    Raises:
        ConfigError: the machine has fewer GPUs than ranks.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= gpus:
        ranks = os.environ.get("LOCAL_WORLD_SIZE", f"more than {local_rank}")
        raise ConfigError(
            f"torchrun started {ranks} ranks on this machine, which shows {gpus} GPU{'s' * (gpus > 1)}: give it "
            f"--nproc-per-node {gpus}, or make more visible (CUDA_VISIBLE_DEVICES)"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
