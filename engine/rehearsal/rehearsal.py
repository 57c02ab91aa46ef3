"""Rehearse a PPO run: one rank of each kind, and what it counted."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from icegrt.config import PPOConfig
from icegrt.distributed.layout import Layout, check_world_size
from icegrt.errors import ConfigError
from icegrt.ppo.setup import check_config
from icegrt.rehearsal.device import rehearsed_cpu, rehearsed_gpu, rehearsed_world
from icegrt.rehearsal.driver import RankCounts, layout_of, run_iteration
from icegrt.rehearsal.hardware import Hardware
from icegrt.rehearsal.phases import DECODE, PREFILL
from icegrt.rehearsal.watcher import Watcher
from icegrt.rehearsal.workload import Workload


@dataclass(frozen=True)
class RankRehearsal:
    """A rank that stands for all of its kind.

    Attributes:
        kind: "every rank", or the pipeline stage: "first stage", "middle stage" or "last stage".
        rank: global rank.
        counts: what it did.
    """

    kind: str
    rank: int
    counts: RankCounts


@dataclass(frozen=True)
class Rehearsal:
    """The rehearsal of one PPO iteration.

    Attributes:
        config: of the run.
        gpus, gpus_per_node: of the cluster.
        hardware: the GPU.
        workload: the lengths.
        ranks: one of each kind.
    """

    config: PPOConfig
    gpus: int
    gpus_per_node: int
    hardware: Hardware
    workload: Workload
    ranks: list[RankRehearsal]

    @property
    def layout(self) -> Layout:
        """The layout of the run."""
        return layout_of(self.config)

    @property
    def data_parallel(self) -> int:
        """The data-parallel size."""
        return self.gpus // self.layout.model

    @property
    def batches_per_rank(self) -> int:
        """Batches of sequences that a data-parallel rank decodes one after the other."""
        local = -(-len(self.workload.responses) // self.data_parallel)
        return -(-local // self.config.max_batch)

    def repetitions(self, phase: str) -> float:
        """Return how often an iteration repeats a rehearsed phase: all batches of a rank, all decode steps of each."""
        if phase == DECODE:
            return self.batches_per_rank * max(self.workload.responses) / self.workload.decode_steps
        return self.batches_per_rank if phase == PREFILL else 1


def rehearse(
    config: PPOConfig,
    *,
    gpus: int,
    gpus_per_node: int,
    hardware: Hardware,
    workload: Workload,
    report: Callable[[str], None] = lambda text: None,
    peaks_only: bool = False,
    on_cpu: bool = False,
) -> Rehearsal:
    """Run one PPO iteration of one rank of each kind on the meta device, and count what it would do on a GPU.

    Weights and data are not read: the folders of the models need a `config.json` alone.

    Args:
        config: of the run.
        gpus: ranks of the run.
        gpus_per_node: GPUs of a node.
        hardware: the GPU.
        workload: lengths of prompts and responses.
        report: called with a line of progress.
        peaks_only: as in `run_iteration`.
        on_cpu: the ranks compute on CPUs; of the hardware only the name is read.

    Raises:
        ConfigError: keys contradict each other, or the layout does not divide GPUs or model.
        CheckpointError: a `config.json` is missing or not supported.
    """
    check_config(config)
    layout = layout_of(config)
    if gpus < 1 or gpus_per_node < 1:
        raise ConfigError(f"--gpus and --gpus-per-node: expected 1 or more, got {gpus} and {gpus_per_node}")
    if gpus > gpus_per_node and gpus % gpus_per_node:
        raise ConfigError(f"--gpus is {gpus}, not a multiple of --gpus-per-node {gpus_per_node}")
    check_world_size(layout, gpus)
    longest = max(workload.prompts, default=0) + config.sampling.max_new_tokens
    if longest > config.token_budget:
        raise ConfigError(
            f"ppo.token_budget is {config.token_budget}, but a prompt may grow to {longest} tokens (with "
            f"max_new_tokens {config.sampling.max_new_tokens}); raise it"
        )
    ranks = []
    for kind, rank in _kinds(layout, gpus).items():
        watcher = Watcher()
        with (
            rehearsed_cpu(watcher) if on_cpu else rehearsed_gpu(watcher, hardware.usable_bytes),
            rehearsed_world(layout, rank, gpus, gpus_per_node) as cluster,
            watcher,
        ):
            progress = partial(_report_phase, report, kind)
            counts = run_iteration(config, cluster, watcher, workload, progress, peaks_only=peaks_only)
        ranks.append(RankRehearsal(kind, rank, counts))
        gc.collect()
    return Rehearsal(config, gpus, gpus_per_node, hardware, workload, ranks)


def _report_phase(report: Callable[[str], None], kind: str, phase: str) -> None:
    report(f"{kind}: {phase}")


def _kinds(layout: Layout, gpus: int) -> dict[str, int]:
    """Return one rank of each kind of pipeline stage. Stages are blocks of consecutive ranks."""
    stage = gpus // layout.pipeline
    if layout.pipeline == 1:
        return {"every rank": 0}
    kinds = {"first stage": 0}
    if layout.pipeline > 2:
        kinds["middle stage"] = stage
    return kinds | {"last stage": stage * (layout.pipeline - 1)}
