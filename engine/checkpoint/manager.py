"""Checkpoints of a run: weights, optimizers and schedules through Megatron's dist_checkpointing, the rest as JSON.

Megatron plans which rank writes what; a thread of each rank writes it, while training goes on where that is asked for;
then rank 0 seals the whole with a manifest and gives it its name (`checkpoint_folder`).
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icegrt.checkpoint import directory as files
from icegrt.checkpoint import megatron
from icegrt.checkpoint import rng as checkpoint_rng
from icegrt.checkpoint.safe_unpickle import restricted_megatron_load
from icegrt.distributed.cluster import Cluster
from icegrt.errors import CheckpointError, RunError
from icegrt.roles.role import Role
from icegrt.utils.console import warn

WriteBucket = Callable[[Any, Any], list[Any]]

# -- saving ------------------------------------------------------------------------------------------------------------


class Checkpoints:
    """Writes the checkpoints of one run. All ranks call every method, in the same order and with the same arguments.

    keep: how many are kept, beside the best. background: `save` returns when the state has been copied to host memory;
    `complete` must be called until nothing is pending. write_bucket: the function that writes one bucket of tensors.
    """

    def __init__(self, run_dir: str | Path, keep: int, *, background: bool) -> None:
        self.run_dir = Path(run_dir)
        self.keep = keep
        self.background = background
        self.write_bucket: WriteBucket = write_bucket
        self._pending: _Pending | None = None

    def save(
        self,
        step: int,
        roles: list[Role],
        state: dict[str, Any],
        quality: float | None = None,
        then: Callable[[Path], None] = lambda path: None,
    ) -> Path:
        """Begin to write `roles` (the ones that learn) and `state` (JSON); one that is pending is finished first.

        quality: the higher, the better; the best is kept beyond its time. then: is told the path once it is there.
        Raises `RunError` on all ranks where it cannot be written; what was there before is as it was.
        """
        self.complete()
        cluster, target = Cluster.current(), files.checkpoint_path(self.run_dir, step)
        schedules = {role.name: role.schedule.state_dict() for role in roles}
        rng = cluster.gather_to_main(checkpoint_rng.capture())
        # As text, and not when it is written: what it refers to changes with the next step.
        text = json.dumps({"step": step, "schedules": schedules, "quality": quality, "rng": rng, **state}, indent=1)
        problem = None
        try:
            if cluster.is_main:
                files.create_staging(target, [role.name for role in roles])
        except OSError as error:
            problem = error.strerror or str(error)
        problem = cluster.broadcast_from_main(problem)
        if problem is not None:
            raise self._cannot_write(target, problem)
        plans = {role.name: megatron.plan_save(role, files.staging_path(target) / role.name) for role in roles}
        writing = _Writing(files.staging_path(target), plans, self.write_bucket, copy=self.background)
        self._pending = _Pending(target, text, plans, writing, then)
        if self.background:
            writing.start()
        else:
            writing.run()
            self.complete()
        return target

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is on its way (on all ranks alike)."""
        return self._pending is not None

    @property
    def ready(self) -> bool:
        """Whether this rank has written its part, so that `complete` would not make others wait."""
        return self._pending is None or not self._pending.writing.is_alive()

    def complete(self) -> None:
        """Wait for the checkpoint that is pending, if there is one, and give it its name."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        pending.writing.finish()
        cluster = Cluster.current()
        parts = cluster.gather_to_main(pending.writing.outcome)
        problem = None
        if cluster.is_main:
            problem = next((part.error for part in parts if part.error), None)
            try:
                if problem is None:
                    self._publish(pending, parts)
            except OSError as error:
                problem = error.strerror or str(error)
        problem = cluster.broadcast_from_main(problem)
        if problem is not None:
            raise self._cannot_write(pending.target, problem)
        pending.then(pending.target)

    def _publish(self, pending: _Pending, parts: list[_Outcome]) -> None:
        from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

        staging = files.staging_path(pending.target)
        for name, plan in pending.plans.items():
            (staging / name / "common.pt").write_bytes(plan.common)
            plan.writer.finish(plan.metadata, [part.results[name] for part in parts])
            save_config(CheckpointingConfig(plan.backend, plan.version), str(staging / name))
        files.write_state(staging, pending.state)
        files.write_manifest(staging, {name: digest for part in parts for name, digest in part.digests.items()})
        files.commit(pending.target)
        files.prune(self.run_dir, self.keep)

    def _cannot_write(self, target: Path, why: Any) -> RunError:
        if Cluster.current().is_main:
            files.discard(target)
        return RunError(
            f"{target}: the checkpoint cannot be written ({why}); the ones before it are whole, so make room or repair "
            "the disk, and resume"
        )


@dataclass
class _Pending:
    target: Path
    state: str
    plans: dict[str, Any]
    writing: _Writing
    then: Callable[[Path], None]


@dataclass
class _Outcome:
    """What a rank has written: by role what Megatron wants to know of it, by file its digest; or why it could not."""

    results: dict[str, list[Any]]
    digests: dict[str, files.Digest]
    error: str | None = None


class _Writing(threading.Thread):
    """Puts this rank's files on the disk. With `copy` the weights may change as soon as this has been made."""

    def __init__(self, staging: Path, plans: dict[str, Any], write_bucket: WriteBucket, *, copy: bool) -> None:
        super().__init__(name="icegrt-checkpoint", daemon=True)
        self.staging, self.write_bucket = staging, write_bucket
        self.transforms = {name: plan.writer.transforms for name, plan in plans.items()}
        self.buckets = {
            name: [_staged(b, copy=copy) for b in plan.writer.write_buckets] for name, plan in plans.items()
        }
        self.outcome = _Outcome({}, {})
        self.rank = Cluster.current().rank
        for plan in plans.values():
            plan.writer.write_buckets = []

    def run(self) -> None:
        try:
            for name, buckets in self.buckets.items():
                results = self.outcome.results[name] = []
                for bucket in buckets:
                    results += self.write_bucket(bucket, self.transforms[name])
                    path = Path(bucket[0])
                    self.outcome.digests[path.relative_to(self.staging).as_posix()] = files.fsync_digest(path)
        except Exception as error:  # said by the main thread, on all ranks
            cause = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
            self.outcome.error = f"{cause}, on rank {self.rank}" if self.rank else cause
        self.buckets = {}

    def finish(self) -> None:
        """Wait until it is done, if it was ever started as a thread."""
        if self.ident is not None:
            self.join()


def _staged(bucket, *, copy: bool):
    path, key, (entries, tensors) = bucket
    return path, key, (entries, [(item, tensor.to("cpu", copy=copy)) for item, tensor in tensors])


def write_bucket(bucket, transforms) -> list[Any]:
    """Write one of Megatron's buckets of tensors to its file; return what Megatron reports of each tensor."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    # Megatron calls this in a forked process and hears of it through queues. A fork of a process with CUDA, NCCL or
    # gloo threads may hang, and numbers can be counted here as well.
    results, running = queue.Queue(), queue.Queue()
    running.put(0)
    FileSystemWriterAsync.write_preloaded_data([transforms], 0, bucket, results, running, use_fsync=True)
    _, written = results.get()
    if isinstance(written, Exception):
        raise written
    return written


# -- loading -----------------------------------------------------------------------------------------------------------


def latest_valid(run_dir: str | Path) -> Path | None:
    """The last checkpoint that agrees with its manifest, which all ranks read together; None if there never was one.

    Those after it are named in a warning and set aside. Raises `CheckpointError` when all are damaged.
    """
    cluster = Cluster.current()
    found, damaged = files.latest_valid(cluster.broadcast_from_main(files.list_checkpoints(run_dir)), _verify_all_ranks)
    said = [files.describe_faults(checkpoint, faults) for checkpoint, faults in damaged.items()]
    if damaged and found is None:
        raise CheckpointError("\n".join([*said, f"{run_dir}: no checkpoint is whole; start anew in another folder"]))
    for checkpoint, line in zip(damaged, said, strict=True):
        warn(f"{line}; going on from the one before it")
        if cluster.is_main:
            files.quarantine(checkpoint)
    cluster.wait()
    return found


def _verify_all_ranks(checkpoint: Path) -> list[str]:
    """As `checkpoint_folder.verify`, read by all ranks together."""
    cluster = Cluster.current()
    parts = cluster.gather_to_main(files.verify(checkpoint, rank=cluster.rank, ranks=cluster.world_size))
    return cluster.broadcast_from_main([fault for part in parts for fault in part] if cluster.is_main else None)


def load(checkpoint: Path, roles: list[Role]) -> dict[str, Any]:
    """Restore `roles` from a checkpoint that is whole; returns the state that was saved with them."""
    document = files.read_state(checkpoint)
    for role in roles:
        if role.learns:
            megatron.allocate_optimizer_states(role)
        loaded = _read(checkpoint, role, megatron.sharded(role, loading=True))
        _take_weights(role, loaded)
        if role.learns:
            megatron.load_optimizer(role, loaded["optimizer"])
            role.schedule.load_state_dict(document["schedules"][role.name])
    cluster = Cluster.current()
    if len(document["rng"]) == cluster.world_size:
        checkpoint_rng.restore(document["rng"][cluster.rank])
    return document


def load_weights(checkpoint: Path, roles: list[Role]) -> None:
    """The weights alone; optimizers and schedules stay as they are. Raises `CheckpointError` for a damaged one."""
    found = _verify_all_ranks(checkpoint)
    if found:
        raise CheckpointError(f"{files.describe_faults(checkpoint, found)}; remove it, and resume")
    for role in roles:
        _take_weights(role, _read(checkpoint, role, {"model": megatron.sharded_model(role)}))


def _read(checkpoint: Path, role: Role, sharded: dict[str, Any]) -> dict[str, Any]:
    from megatron.core import dist_checkpointing

    folder = checkpoint / role.name
    if not folder.is_dir():
        raise CheckpointError(f"{checkpoint}: holds no {role.name}")
    with megatron.quiet(), restricted_megatron_load(folder) as common:
        return dist_checkpointing.load(sharded, str(folder), common_strategy=common)


def _take_weights(role: Role, loaded: dict[str, Any]) -> None:
    for chunk, state in zip(role.model.chunks, loaded["model"], strict=True):
        chunk.load_state_dict(state)
