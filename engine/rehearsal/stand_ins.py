"""What takes the place of data that a rehearsal does not have: weights, sampled lengths, and neighbours' messages."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from icegrt.distributed.cluster import Cluster
from icegrt.distributed.cpu_backend import Patches
from icegrt.model.architecture import Architecture
from icegrt.model.build import build_parallel_adapter, build_parallel_model
from icegrt.model.lora.trunk_hash import TrunkIdentity
from icegrt.model.pipeline_model import PipelineModel
from icegrt.ppo import role_setup
from icegrt.rehearsal.phases import DECODE, PREFILL
from icegrt.rehearsal.watcher import Watcher
from icegrt.roles.role import Role
from icegrt.rollout.micro_group import MicroGroup, Step
from icegrt.rollout.model_runner import ModelRunner
from icegrt.scheduling import StepPlan
from icegrt.utils.files import model_folder


class ConfigReader:
    """A checkpoint of which only `config.json` is read."""

    def __init__(self, source: Any) -> None:
        self.folder = model_folder(source)
        self.where = str(source)
        self.architecture = Architecture.from_pretrained(self.folder)


@contextlib.contextmanager
def models_without_weights() -> Iterator[None]:
    """Let `ppo.role_setup` build models from `config.json` alone, and adapters from their configuration."""

    def build(
        source: Any, head: Any, cluster: Cluster, *, dtype: Any, new_head: bool = False, recompute: str = "none"
    ) -> PipelineModel:
        return build_parallel_model(source.architecture, head, cluster, dtype=dtype, recompute=recompute)

    def build_adapter(trunk: Any, spec: Any, head: Any, source: Any, identity: Any) -> PipelineModel:
        return build_parallel_adapter(trunk, spec, head, identity)

    with Patches() as patches:
        patches.set(role_setup, "HFCheckpointReader", ConfigReader)
        patches.set(role_setup, "build_model", build)
        patches.set(role_setup, "build_adapter", build_adapter)
        patches.set(role_setup, "identity_of", lambda reader, cluster: TrunkIdentity("", reader.where))
        yield


@contextlib.contextmanager
def given_lengths(watcher: Watcher, decode_steps: int, stop: int) -> Iterator[None]:
    """End all responses so that `decode_steps` steps have decodes alone, and count those steps in a phase of their own.

    A step with rows of prompts counts as prefill, the decodes beside them included.
    """
    prepare, forward, collect = MicroGroup.prepare, ModelRunner.forward, ModelRunner.collect
    completed: Counter[MicroGroup] = Counter()
    group_of: dict[Step, MicroGroup] = {}

    def prepared(group: MicroGroup, plan: StepPlan, sequence_ids: list[int]) -> Any:
        with watcher.phase(DECODE if plan.n_rows == plan.n_decodes else PREFILL):
            return prepare(group, plan, sequence_ids)

    def forwarded(runner: ModelRunner, group: MicroGroup, step: Step, chunk: int) -> None:
        group_of[step] = group
        with watcher.phase(DECODE if step.size.only_decodes else PREFILL):
            forward(runner, group, step, chunk)

    def collected(runner: ModelRunner, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        with watcher.phase(DECODE if step.size.only_decodes else PREFILL):
            token_N, logprob_N = collect(runner, step)
        group = group_of.pop(step)
        completed[group] += step.size.only_decodes
        # Steps that are planned already run, too.
        is_last = step.size.only_decodes and completed[group] >= decode_steps - group.lookahead
        return torch.full_like(token_N, stop if is_last else 1), logprob_N

    with Patches() as patches:
        patches.set(MicroGroup, "prepare", prepared)
        patches.set(ModelRunner, "forward", forwarded)
        patches.set(ModelRunner, "collect", collected)
        yield


@contextlib.contextmanager
def given_shapes(watcher: Watcher) -> Iterator[None]:
    """Announce to this rank the shapes of its neighbours' messages: those of its own micro-batches, in order."""
    run = Role._run

    def announced(role: Role, chunks: Any, work: Any, *args: Any, **options: Any) -> Any:
        from megatron.core import parallel_state

        config = role.model.config
        ranks = config.tensor_model_parallel_size if config.sequence_parallel else 1
        shapes = [[batch.n_tokens // ranks, 1, config.hidden_size] for batch, _ in work]
        stage = dist.get_rank(parallel_state.get_pipeline_model_parallel_group())
        watcher.expected_shapes = {stage - 1: list(shapes), stage + 1: list(shapes)}
        return run(role, chunks, work, *args, **options)

    with Patches() as patches:
        patches.set(Role, "_run", announced)
        yield
