"""Write and read the checkpoints of a run.

Weights, optimizers and schedules go through Megatron's dist_checkpointing, everything else into a JSON file. Megatron
plans which rank writes what. A thread of each rank writes it, in the background on request. Then rank 0 writes the
manifest and commits the staging directory (`directory.py`).
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icegrt.checkpoint import directory as files
from icegrt.checkpoint import megatron
from icegrt.checkpoint import rng as checkpoint_rng
from icegrt.checkpoint.safe_unpickle import restricted_megatron_load
from icegrt.distributed.cluster import Cluster
from icegrt.errors import CheckpointError, RunError
from icegrt.residency import OPTIMIZER, PARAMETERS
from icegrt.roles.role import Role, TrainableRole
from icegrt.utils.console import warn

WriteBucket = Callable[[Any, Any], list[Any]]


class Checkpoints:
    """The checkpoints of one run. All methods are collective: all ranks call them in the same order.

    Args:
        cluster: the process groups.
        run_dir: folder of the run.
        keep: number of checkpoints to keep besides the best.
        background: `save` returns as soon as the state is copied to host memory; `complete` waits for the files.

    Attributes:
        write_bucket: the function that writes one file of Megatron's plan.
    """

    def __init__(self, cluster: Cluster, run_dir: str | Path, keep: int, *, background: bool) -> None:
        self.cluster = cluster
        self.run_dir = Path(run_dir)
        self.keep = keep
        self.background = background
        self.write_bucket: WriteBucket = write_bucket
        self._pending: _Pending | None = None

    # -- saving ----------------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        roles: Sequence[TrainableRole],
        state: dict[str, Any],
        quality: float | None = None,
        on_committed: Callable[[Path], None] = lambda path: None,
    ) -> Path:
        """Start to write a checkpoint, after completing a pending one.

        Args:
            step: number of finished steps.
            roles: the roles that learn.
            state: JSON document of the trainer.
            quality: higher is better; the best checkpoint is never pruned. None takes no part.
            on_committed: called with the path after the rename.

        Returns:
            The path of the checkpoint.

        Raises:
            RunError: on all ranks, if the checkpoint cannot be written. Earlier checkpoints are unchanged.
        """
        self.finish_pending()
        # 1. The JSON document, as text now: the objects in it change with the next step.
        target = files.checkpoint_path(self.run_dir, step)
        schedules = {role.name: role.schedule.state_dict() for role in roles}
        rng = self.cluster.gather_to_main(checkpoint_rng.capture())
        document = {"step": step, "schedules": schedules, "quality": quality, "rng": rng, **state}
        text = json.dumps(document, indent=1)
        # 2. The staging directory, on rank 0.
        problem = None
        try:
            if self.cluster.is_main:
                files.create_staging(target, [role.name for role in roles])
        except OSError as error:
            problem = error.strerror or str(error)
        problem = self.cluster.broadcast_from_main(problem)
        if problem is not None:
            raise self._write_error(target, problem)
        # 3. Megatron's plans, and the thread that writes this rank's files. One role at a time needs the device.
        staging = files.staging_path(target)
        plans = {}
        writer = _WriterThread(staging, self.cluster.rank, self.write_bucket)
        for role in roles:
            with role.placement.hold(PARAMETERS, OPTIMIZER):
                plans[role.name] = megatron.plan_save(role, staging / role.name)
                writer.add(role.name, plans[role.name], copy=self.background)
                if not self.background:
                    writer.run()
        self._pending = _Pending(target, text, plans, writer, on_committed)
        if self.background:
            writer.start()
        else:
            self.finish_pending()
        return target

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is being written. All ranks agree."""
        return self._pending is not None

    @property
    def ready(self) -> bool:
        """Whether this rank has written its files, so that `finish_pending` would not delay other ranks."""
        return self._pending is None or not self._pending.writer.is_alive()

    def finish_pending(self) -> None:
        """Wait for the pending checkpoint and commit it; do nothing if none is pending. Collective.

        Raises:
            RunError: on all ranks, if the checkpoint cannot be written.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        pending.writer.finish()
        outcomes = self.cluster.gather_to_main(pending.writer.outcome)
        problem = None
        if self.cluster.is_main:
            problem = next((outcome.error for outcome in outcomes if outcome.error), None)
            try:
                if problem is None:
                    self._commit(pending, outcomes)
            except OSError as error:
                problem = error.strerror or str(error)
        problem = self.cluster.broadcast_from_main(problem)
        if problem is not None:
            raise self._write_error(pending.target, problem)
        pending.on_committed(pending.target)

    def _commit(self, pending: _Pending, outcomes: list[_Outcome]) -> None:
        from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

        staging = files.staging_path(pending.target)
        for name, plan in pending.plans.items():
            (staging / name / "common.pt").write_bytes(plan.common)
            plan.writer.finish(plan.metadata, [outcome.results[name] for outcome in outcomes])
            save_config(CheckpointingConfig(plan.backend, plan.version), str(staging / name))
        files.write_state(staging, pending.state)
        digests = {name: digest for outcome in outcomes for name, digest in outcome.digests.items()}
        files.write_manifest(staging, digests)
        files.commit(pending.target)
        # The new checkpoint is complete: an old one that stays is no reason to end the run.
        for problem in files.prune(self.run_dir, self.keep):
            warn(problem)

    def _write_error(self, target: Path, problem: str) -> RunError:
        if self.cluster.is_main:
            files.discard(target)
        return RunError(
            f"{target}: the checkpoint cannot be written ({problem}); the ones before it are whole, so make room or "
            "repair the disk, and resume"
        )

    # -- loading ---------------------------------------------------------------------------------------------------

    def latest_valid(self) -> Path | None:
        """Return the last checkpoint that matches its manifest; None if the run has no checkpoint.

        Later ones are quarantined, with a warning.

        Raises:
            CheckpointError: all checkpoints are damaged.
        """
        checkpoints = self.cluster.broadcast_from_main(files.list_checkpoints(self.run_dir))
        valid, damaged = files.latest_valid(checkpoints, self._verify)
        descriptions = [files.describe_faults(checkpoint, faults) for checkpoint, faults in damaged.items()]
        if damaged and valid is None:
            raise CheckpointError(
                "\n".join([*descriptions, f"{self.run_dir}: no checkpoint is whole; start anew in another folder"])
            )
        for checkpoint, description in zip(damaged, descriptions, strict=True):
            warn(f"{description}; going on from the one before it")
            if self.cluster.is_main:
                files.quarantine(checkpoint)
        self.cluster.barrier()
        return valid

    def load(self, checkpoint: Path, roles: Sequence[Role]) -> dict[str, Any]:
        """Restore roles and this process's random generators from a valid checkpoint. Returns its JSON document."""
        document = files.read_state(checkpoint)
        for role in roles:
            with role.placement.hold(PARAMETERS, OPTIMIZER):
                if role.learns:
                    megatron.allocate_optimizer_states(role)
                loaded = _read(checkpoint, role, megatron.sharded(role, loading=True))
                _restore_weights(role, loaded)
                if role.learns:
                    megatron.load_optimizer(role, loaded["optimizer"])
                    role.schedule.load_state_dict(document["schedules"][role.name])
                del loaded
        if len(document["rng"]) == self.cluster.world_size:
            checkpoint_rng.restore(document["rng"][self.cluster.rank])
        return document

    def load_weights(self, checkpoint: Path, roles: Sequence[Role]) -> None:
        """Restore weights only; optimizers and schedules are unchanged.

        Raises:
            CheckpointError: the checkpoint is damaged.
        """
        faults = self._verify(checkpoint)
        if faults:
            raise CheckpointError(f"{files.describe_faults(checkpoint, faults)}; remove it, and resume")
        for role in roles:
            with role.placement.hold(PARAMETERS):
                _restore_weights(role, _read(checkpoint, role, {"model": megatron.sharded_model(role)}))

    def _verify(self, checkpoint: Path) -> list[str]:
        # Every rank reads a part of the files.
        cluster = self.cluster
        parts = cluster.gather_to_main(files.verify(checkpoint, rank=cluster.rank, ranks=cluster.world_size))
        return cluster.broadcast_from_main([fault for part in parts for fault in part] if cluster.is_main else None)


@dataclass
class _Pending:
    target: Path
    state: str
    plans: dict[str, Any]
    writer: _WriterThread
    on_committed: Callable[[Path], None]


@dataclass
class _Outcome:
    """The result of a rank's writes: Megatron's results by role and a digest by file, or an error message."""

    results: dict[str, list[Any]]
    digests: dict[str, files.Digest]
    error: str | None = None


class _WriterThread(threading.Thread):
    """Writes this rank's files: in the background, or by `run` in the calling thread."""

    def __init__(self, staging: Path, rank: int, write_bucket: WriteBucket) -> None:
        super().__init__(name="icegrt-checkpoint", daemon=True)
        self.staging = staging
        self.rank = rank
        self.write_bucket = write_bucket
        self.transforms: dict[str, Any] = {}
        self.buckets: dict[str, list[Any]] = {}
        self.outcome = _Outcome({}, {})

    def add(self, name: str, plan: Any, *, copy: bool) -> None:
        """Take the state of a role from Megatron's plan. With `copy` the state may change from then on."""
        self.transforms[name] = plan.writer.transforms
        self.buckets[name] = [_to_host(bucket, copy=copy) for bucket in plan.writer.write_buckets]
        plan.writer.write_buckets = []

    def run(self) -> None:
        """Write what was added since the last call, unless a file has failed."""
        try:
            for name, buckets in self.buckets.items() if self.outcome.error is None else ():
                results = self.outcome.results[name] = []
                for bucket in buckets:
                    results += self.write_bucket(bucket, self.transforms[name])
                    path = Path(bucket[0])
                    self.outcome.digests[path.relative_to(self.staging).as_posix()] = files.fsync_digest(path)
        except Exception as error:  # raised on all ranks by `complete`
            cause = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
            self.outcome.error = f"{cause}, on rank {self.rank}" if self.rank else cause
        self.buckets = {}

    def finish(self) -> None:
        """Wait for the thread if it was started."""
        if self.ident is not None:
            self.join()


def _to_host(bucket, *, copy: bool):
    path, key, (entries, tensors) = bucket
    return path, key, (entries, [(item, tensor.to("cpu", copy=copy)) for item, tensor in tensors])


def write_bucket(bucket, transforms) -> list[Any]:
    """Write one file of Megatron's plan. Returns Megatron's results.

    Raises:
        OSError: the file cannot be written.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    # Megatron 0.16: calls this in a forked process and collects results from queues -> a fork of a process with CUDA,
    # NCCL or gloo threads may hang. We call it in this process with queues of our own.
    results, running = queue.Queue(), queue.Queue()
    running.put(0)
    FileSystemWriterAsync.write_preloaded_data([transforms], 0, bucket, results, running, use_fsync=True)
    _, written = results.get()
    if isinstance(written, Exception):
        raise written
    return written


def _read(checkpoint: Path, role: Role, sharded: dict[str, Any]) -> dict[str, Any]:
    from megatron.core import dist_checkpointing

    folder = checkpoint / role.name
    if not folder.is_dir():
        raise CheckpointError(f"{checkpoint}: holds no {role.name}")
    with megatron.quiet(), restricted_megatron_load(folder) as common:
        return dist_checkpointing.load(sharded, str(folder), common_strategy=common)


def _restore_weights(role: Role, loaded: dict[str, Any]) -> None:
    role.model.mark_weights_changed()
    for chunk, state in zip(role.model.chunks, loaded["model"], strict=True):
        chunk.load_state_dict(state)
