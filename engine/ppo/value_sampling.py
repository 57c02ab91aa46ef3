"""Sample and score rollouts of a fixed policy: what value pretraining learns from if none are recorded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from icegrt.config import PPOConfig
from icegrt.data import Prompt, PromptSampler, stop_ids
from icegrt.distributed.cluster import Cluster
from icegrt.errors import ConfigError
from icegrt.model.build import check_parallelism
from icegrt.model.hf.reader import HFCheckpointReader
from icegrt.model.hf.score_statistics import saved_statistics
from icegrt.ppo.batch_plan import plan_batches
from icegrt.ppo.metrics import source_columns
from icegrt.ppo.reward_sources import RewardComposition
from icegrt.ppo.rewards import RewardComputer, RewardModel, RewardOutputs
from icegrt.ppo.role_setup import build_policy_roles, policy_sources
from icegrt.ppo.scores import RunningScoreNormalizer, RunningScoreNormalizers, total_scores
from icegrt.ppo.setup import check_config, check_lengths, encode_run_prompts
from icegrt.rollout.engine import RolloutEngine
from icegrt.rollout.settings import RolloutSettings
from icegrt.rollout.types import Response, Sampling
from icegrt.training.inputs import tokenizer_for
from icegrt.utils.console import progress
from icegrt.utils.files import JsonlWriter


def sample_rollouts(config: PPOConfig, iterations: int, path: Path, cluster: Cluster) -> None:
    """Write the scored responses of `iterations` iterations to `path`, atomically. Collective.

    Prompts, sampling and scores are those of the first iterations of PPO: the running moments of reward models are
    updated alike. The KL penalty is not part of the scores: PPO's actor starts as its own reference.

    Args:
        config: of PPO; its layout is not read, as models are built in the cluster's.
        iterations: to sample.
        path: JSONL file to write, on rank 0.
        cluster: the open process groups.

    Raises:
        UserError: an input cannot be used.
    """
    check_config(config)
    for key in ("actor", "prompts"):
        if not getattr(config, key):
            raise ConfigError(f"ppo.{key} is empty; value pretraining samples answers of ppo.actor to ppo.prompts")
    rewards = RewardComposition.of(config, None)
    try:
        policy = _Policy(config, rewards, cluster)
        if not cluster.is_main:
            for _ in policy.rows(iterations):
                pass
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with JsonlWriter(path) as writer:
            for row in policy.rows(iterations):
                writer.write(row)
    finally:
        rewards.sources.close()


class _Policy:
    """The actor with its prompts and reward sources."""

    def __init__(self, config: PPOConfig, rewards: RewardComposition, cluster: Cluster) -> None:
        self.config, self.cluster = config, cluster
        # 1. Checks, tokenizer and prompts, as a PPO run makes them.
        pretrained = HFCheckpointReader(config.actor)
        architecture = pretrained.architecture
        check_parallelism(architecture, cluster)
        rewards.sources.start()
        tokenizer = tokenizer_for(None, config.actor, architecture)
        stops = stop_ids(
            tokenizer,
            architecture.hf_config,
            pretrained.folder,
            config.sampling.stop_token_ids,
            architecture.generation_config,
        )
        self.prompts = encode_run_prompts(config, "prompts", config.prompts, tokenizer, architecture.context_length)
        # 2. The actor and the reward models, which only read.
        sources = policy_sources(config, pretrained, rewards)
        check_lengths(config, [self.prompts], {name: s.reader.architecture for name, s in sources.items()})
        roles = build_policy_roles(config, sources, cluster)
        settings = RolloutSettings.of(config.rollout, config.max_batch)
        self.engine = RolloutEngine(roles["actor"].model, tokenizer, stop_token_ids=stops, settings=settings)
        specs = rewards.models
        models = [RewardModel(spec.name, spec.weight, roles[role]) for role, spec in specs.items()]
        self.reward_computer = RewardComputer(models, rewards.sources, tokenizer, cluster)
        self.normalizers = RunningScoreNormalizers(
            {spec.name: RunningScoreNormalizer(config, saved_statistics(spec.model)) for spec in specs.values()}
        )

    def rows(self, iterations: int) -> Iterator[dict[str, Any]]:
        """Yield the scored responses of the first iterations. Collective: every rank takes all rows."""
        config, order = self.config, PromptSampler(len(self.prompts), self.config.run.seed)
        sampling = Sampling.of(config.sampling, config.run.seed)
        per_iteration = config.prompts_per_iteration * config.samples_per_prompt
        with progress(iterations, "value: sampling", "iterations") as bar:
            for iteration in range(1, iterations + 1):
                self.cluster.enter_phase(f"sampling of iteration {iteration}")
                prompts = [self.prompts[i] for i in order.draw(config.prompts_per_iteration)]
                responses = self.engine.generate(
                    [p.tokens for p in prompts],
                    config.samples_per_prompt,
                    sampling,
                    first_sequence_id=(iteration - 1) * per_iteration,
                )
                self.engine.release()
                yield from self._scored(iteration, responses, prompts)
                bar.advance(1)

    def _scored(self, iteration: int, responses: list[Response], prompts: list[Prompt]) -> Iterator[dict[str, Any]]:
        config = self.config
        plan = plan_batches(responses, config.token_budget, minibatch_by=config.minibatch_by, cluster=self.cluster)
        rewards: RewardOutputs = self.reward_computer(plan, prompts)
        local = rewards.select(plan.rank_assignment[plan.rank])
        self.normalizers.observe(local.models, ~local.dropped_N, self.cluster.device, self.cluster.data_group)
        scores = total_scores(
            config,
            self.normalizers,
            local.models,
            local.source_total_N,
            plan.truncated_N,
            local.dropped_N,
            lengths_N=plan.cu_actions.diff(),
        )
        total_N = plan.all_gather_sequences(scores.total_N)
        for n, (response, sample) in enumerate(zip(responses, rewards.samples, strict=True)):
            yield {
                "iteration": iteration,
                "sequence_id": response.sequence_id,
                "where": sample.where,
                "text": sample.text,
                "finish_reason": response.finish_reason,
                "score": float(total_N[n]),
                **source_columns(rewards, n),
                "prompt_ids": response.prompt,
                "response_ids": response.tokens,
            }
