"""One PPO iteration of one rank, through the real stage code, on the rehearsed GPU."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from icegrt import residency
from icegrt.checkpoint.megatron import init_optimizer_states
from icegrt.config import PPOConfig
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.cpu_backend import Patches
from icegrt.distributed.layout import Layout
from icegrt.distributed.pipeline import fetch
from icegrt.errors import ConfigError
from icegrt.model.pipeline_model import PipelineModel
from icegrt.ppo import role_setup
from icegrt.ppo.batch_plan import BatchPlan, plan_batches, stream_seed
from icegrt.ppo.corrections import rollout_logprobs, score_policies
from icegrt.ppo.experience import Experience, compute_advantages
from icegrt.ppo.kl_controller import kl_controller
from icegrt.ppo.loss_weights import loss_weights
from icegrt.ppo.reward_sources import RewardComposition
from icegrt.ppo.scores import ModelScores, RunningScoreNormalizer, RunningScoreNormalizers, total_scores
from icegrt.ppo.scoring import LogprobScorer, score_sequences, score_values
from icegrt.ppo.update import Updater
from icegrt.ppo.value_reuse import learn_values
from icegrt.rehearsal import memory
from icegrt.rehearsal.extent import largest_work
from icegrt.rehearsal.offloading import counted_moves
from icegrt.rehearsal.phases import ACTOR, ADVANTAGES, BUILD, CRITIC, INFERENCE, PREFILL
from icegrt.rehearsal.process_groups import GroupUse, groups_of
from icegrt.rehearsal.stand_ins import ConfigReader, given_lengths, given_shapes, models_without_weights
from icegrt.rehearsal.watcher import Watcher
from icegrt.rehearsal.workload import Workload
from icegrt.residency import KINDS
from icegrt.roles.optimizer import inner_optimizers
from icegrt.roles.role import Role, TrainableRole
from icegrt.rollout.decoder import Decoder
from icegrt.rollout.gather import all_gather_responses
from icegrt.rollout.memory import cache_bytes
from icegrt.rollout.paged_cache import block_bytes
from icegrt.rollout.settings import RolloutSettings
from icegrt.rollout.storage import stage_shape
from icegrt.rollout.types import Sampling
from icegrt.training.inputs import resolve_chunk_rows


@dataclass(frozen=True)
class RankCounts:
    """What one rank did.

    Attributes:
        watcher: its counts by phase, and its memory.
        groups: its process groups.
        parameters: of this rank, over all roles.
        chunk_rows: logit chunk size.
        micro_batches: of this rank's inference.
        tokens: of this rank's micro-batches, and those of them that are alignment tails.
        sequences: that this rank decodes together.
    """

    watcher: Watcher
    groups: list[GroupUse]
    parameters: int
    chunk_rows: int
    micro_batches: int
    tokens: int
    tail_tokens: int
    sequences: int


def run_iteration(
    config: PPOConfig,
    cluster: Cluster,
    watcher: Watcher,
    workload: Workload,
    report: Callable[[str], None],
    *,
    peaks_only: bool = False,
) -> RankCounts:
    """Run one iteration of this rank; call it inside `rehearsed_gpu`, `rehearsed_world` and the watcher.

    Args:
        config: of the run.
        cluster: this rank's.
        watcher: counts.
        workload: lengths of the sequences.
        report: called with the name of each phase.
        peaks_only: run only the micro-batches and steps that set the peaks of memory, and let Adam's moments exist from
            the start, as in every iteration but the first. Other counts are then incomplete.
    """
    if cluster.layout.virtual_pipeline > 1:
        raise ConfigError(
            "rehearse: parallel.virtual_pipeline above 1 cannot be rehearsed, because interleaved stages exchange the "
            "shapes of their messages with ranks that do not exist here; set it to 1"
        )
    shortened = largest_work(cluster.layout.pipeline) if peaks_only else contextlib.nullcontext()
    with given_shapes(watcher), counted_moves(watcher), shortened:
        # 1. Models and roles, as ppo.role_setup builds them, without weights.
        report(BUILD)
        with watcher.phase(BUILD):
            iteration = _Iteration(config, cluster, watcher)
            iteration.announce_order()
            if peaks_only:
                iteration.allocate_optimizer_states()
        # 2. The stages in the order of an iteration.
        report("rollout")
        sequences = iteration.rollout(workload)
        plan = plan_batches(
            workload.full_responses(iteration.actor.model.architecture.vocab_size),
            config.token_budget,
            config.minibatches,
            minibatch_by=config.minibatch_by,
            cluster=cluster,
            seed=stream_seed(config.run.seed, 1),
        )
        report(INFERENCE)
        with watcher.phase(INFERENCE):
            iteration.infer(plan)
        report(ADVANTAGES)
        with watcher.phase(ADVANTAGES):
            iteration.shape_scores(plan)
        if iteration.critic is not None and config.reuse_update_values:
            iteration.learn_values(plan)
        with watcher.phase(ADVANTAGES):
            experience = iteration.advantages(plan)
        report("update")
        iteration.update(experience)
    return RankCounts(
        watcher=watcher,
        groups=groups_of(watcher),
        parameters=sum(p.numel() for role in iteration.roles.values() for p in role.model.parameters()),
        chunk_rows=iteration.scorer.chunk_rows or 0,
        micro_batches=len(plan.batches),
        tokens=plan.n_tokens,
        tail_tokens=plan.tail_tokens,
        sequences=sequences,
    )


class _Iteration:
    """The components of a run, and the stages of its iteration."""

    def __init__(self, config: PPOConfig, cluster: Cluster, watcher: Watcher) -> None:
        # All scores are 0 here. A run has advantages, and in the worst case no response leaves.
        config = dataclasses.replace(config, skip_zero_advantage=False)
        self.config, self.cluster, self.watcher = config, cluster, watcher
        rewards = RewardComposition.of(config, None)
        with models_without_weights():
            source: Any = ConfigReader(config.actor)
            reference, critic = config.reference or None, config.critic.model or None
            sources = role_setup.role_sources(config, source, reference, rewards, critic)
            self.roles = self._build_roles(sources)
        self.actor, self.critic = self.roles["actor"], self.roles.get("critic")
        self.reference = self.roles["reference"]
        self.specs = rewards.models
        self.normalizers = RunningScoreNormalizers(
            {spec.name: RunningScoreNormalizer(config) for spec in self.specs.values()}
        )
        chunk_rows = resolve_chunk_rows(config.chunk_rows, self.actor.model.architecture)
        self.scorer = LogprobScorer(config.sampling.temperature, chunk_rows)
        actor: Any = self.actor
        critic: Any = self.critic
        self.updater = Updater(config, actor, critic, self.scorer, cluster)
        self.kl_controller = kl_controller(config)

    def _build_roles(self, sources: dict[str, role_setup.RoleSource]) -> dict[str, Role]:
        roles = role_setup.build_roles(self.config, sources, self.cluster)
        label = self.watcher.device.label
        for role in roles.values():
            if isinstance(role, TrainableRole):
                for inner in inner_optimizers(role.optimizer):
                    for group in inner.optimizer.param_groups:
                        for main in group[
                            "params"
                        ]:  # fp32 copies, or shards of the parameters, which are labelled below
                            label(main, memory.OPTIMIZER)
                for ddp in role.ddps:
                    for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers):
                        label(buffer.grad_data, memory.GRADIENTS)
            for parameter in role.model.parameters():
                label(parameter, memory.PARAMETERS)
        return roles

    def announce_order(self) -> None:
        """Hold what an iteration holds, in its order: prefetching knows it from the iteration before."""
        if not self.config.offload.prefetch:
            return
        critics = [] if self.critic is None else [self.critic]
        inferred = critics if self.config.critic_is_inferred else []
        forward = [self.actor, *(self.roles[name] for name in self.specs), *inferred, self.actor, self.reference]
        for role in forward:
            with role.placement.hold_for_pass():
                pass
        for role in (self.actor, *critics) if self.config.critic_is_inferred else (*critics, self.actor):
            role.placement.require(*KINDS)
        with self.actor.placement.hold_for_pass():
            pass

    def allocate_optimizer_states(self) -> None:
        """Allocate Adam's moments, which a role's first step would allocate."""
        for role in self.roles.values():
            if isinstance(role, TrainableRole):
                with role.placement.hold(residency.OPTIMIZER):
                    init_optimizer_states(role)
                _label_optimizer_states(role, self.watcher)

    def rollout(self, workload: Workload) -> int:
        """Prefill, and take `decode_steps` steps with all sequences. Returns the sequences of this rank."""
        config, model = self.config, self.actor.model
        vocab_size = model.architecture.vocab_size
        prompts, samples, stop = workload.prompt_tokens(vocab_size), workload.samples, vocab_size - 1
        sampling = Sampling.of(config.sampling, config.run.seed)
        settings = _with_room(
            RolloutSettings.of(config.rollout, config.max_batch),
            model,
            max(map(len, prompts)) + sampling.max_new_tokens,
        )
        decoder = Decoder(model, [stop], settings)
        # All batches of a rank cost the same; the first is rehearsed.
        local = -(-len(prompts) // self.cluster.share.ranks)
        first = prompts[: min(local, max(1, config.max_batch // samples))]
        with self.watcher.phase(PREFILL):
            model.wait_for_param_gather()
            with given_lengths(self.watcher, workload.decode_steps, stop):
                responses = list(decoder.stream(first, samples, sampling))
            decoder.release()
            all_gather_responses(self.cluster, responses, prompts, samples, 0, model.weights_version)
        return len(first) * samples

    def infer(self, plan: BatchPlan) -> None:
        """Score with reward models, critic, actor and reference, in the order of the trainer."""
        scores = fetch([score_sequences(self.roles[role], plan.batches) for role in self.specs])
        self.models = []
        for spec, score_N in zip(self.specs.values(), scores, strict=True):
            # The collective is counted. What the other ranks would send does not exist, nor does its length.
            self.cluster.all_gather(score_N)
            self.models.append(ModelScores(spec.name, spec.weight, torch.zeros(len(plan.responses))))
        self.value_A = self.last_value_N = self.value_step = None
        if self.critic is not None and self.config.critic_is_inferred:
            self.value_A, self.last_value_N = score_values(self.critic, plan.batches)
        self.old_A, self.entropy_A, self.ref_A = score_policies(
            self.config, self.scorer, self.actor, self.reference, plan
        )

    def shape_scores(self, plan: BatchPlan) -> None:
        """Normalise the scores, and add them up."""
        group = self.cluster.data_group
        local = [ModelScores(m.name, m.weight, m.score_N[plan.rank_assignment[plan.rank]]) for m in self.models]
        for model in local:
            self.normalizers[model.name].update(model.score_N.to(self.cluster.device), group)
        self.scores = total_scores(self.config, self.normalizers, local, None, plan.truncated_N)

    def learn_values(self, plan: BatchPlan) -> None:
        """Take the critic's first step, which gives the values."""
        kl_coef, streams = self.kl_controller.coef, (self.scores, self.old_A, self.ref_A)
        with _phases_of_steps(self.watcher, {"critic": CRITIC}):
            step = learn_values(self.config, self.critic, kl_coef, plan, *streams)
        self.value_A, self.last_value_N, self.value_step = step.value_A, step.last_value_N, step.outcome

    def advantages(self, plan: BatchPlan) -> Experience:
        """Run KL penalty and GAE."""
        config, group, scores = self.config, self.cluster.data_group, self.scores
        kl_coef = self.kl_controller.coef
        shaped = compute_advantages(
            config, kl_coef, plan, scores, self.old_A, self.ref_A, self.value_A, self.last_value_N
        )
        moments = shaped.moments.reduce(group)
        # Every response counts as right: the positive-example loss then costs most.
        positive_N = torch.ones_like(plan.truncated_N) if config.positive_nll_coef else None
        rollout_A = None if config.correction == "none" else rollout_logprobs(plan, self.cluster.device)
        weights = loss_weights(config, plan, self.old_A, rollout_A, positive_N, self.cluster)
        streams = (self.old_A, self.entropy_A, self.ref_A, self.value_A)
        return Experience(plan, scores, *streams, shaped, moments, rollout_A, weights)

    def update(self, experience: Experience) -> None:
        """Take the optimizer steps of actor and critic."""
        with _phases_of_steps(self.watcher, {"actor": ACTOR, "critic": CRITIC}):
            iteration = self.config.critic_warmup + 1
            self.updater.run(experience, self.kl_controller.coef, iteration, value_step=self.value_step)


def _with_room(settings: RolloutSettings, model: PipelineModel, longest: int) -> RolloutSettings:
    """Return the settings with a cache for at least one sequence of `longest` tokens on every pipeline rank.

    A run without that room would be refused; a rehearsal shows by how much it does not fit.
    """
    blocks = -(-longest // settings.block_size) * model.cluster.layout.pipeline
    dtype = next(model.parameters()).dtype
    least = blocks * block_bytes(len(model.layer_indices), settings.block_size, stage_shape(model), dtype)
    if cache_bytes(settings.kv_memory, model.device) >= least:
        return settings
    return dataclasses.replace(settings, kv_memory=float(least))


@contextlib.contextmanager
def _phases_of_steps(watcher: Watcher, phases: dict[str, str]) -> Iterator[None]:
    """Count every optimizer step in the phase of its role, and label the state that the optimizer allocates."""
    step = TrainableRole.train_step

    def phased(role: TrainableRole, work: Any, lr: float | None = None) -> Any:
        with watcher.phase(phases[role.name]):
            outcome = step(role, work, lr)
        _label_optimizer_states(role, watcher)
        return outcome

    with Patches() as patches:
        patches.set(TrainableRole, "train_step", phased)
        yield


def _label_optimizer_states(role: TrainableRole, watcher: Watcher) -> None:
    for inner in inner_optimizers(role.optimizer):
        for state in inner.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    watcher.device.label(value, memory.OPTIMIZER)


def layout_of(config: PPOConfig) -> Layout:
    """Return the layout of a run."""
    return Layout.of(config.parallel)
