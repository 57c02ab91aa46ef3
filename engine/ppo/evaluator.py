"""Held-out answers and their scores: sampled with a fixed seed, or greedy.

The seed is the same in every evaluation, so that two of them differ by the weights alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from icegrt.config import PPOConfig
from icegrt.data import Prompt
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.pipeline import fetch
from icegrt.metrics import Evaluation
from icegrt.metrics.statistics import distinct_fraction
from icegrt.ppo.batch_plan import BatchPlan, plan_batches, truncated_mask
from icegrt.ppo.rewards import RewardComputer, RewardOutputs
from icegrt.ppo.scores import RunningScoreNormalizers, total_scores
from icegrt.ppo.scoring import LogprobScorer
from icegrt.residency import PARAMETERS
from icegrt.rewards.sample import Sample
from icegrt.roles.role import Role
from icegrt.rollout.engine import RolloutEngine
from icegrt.rollout.types import Response, Sampling

# Combined with the run's seed, so that evaluation and training never share their sampling noise.
_EVALUATION_SEED = 0x1CE


@dataclass(frozen=True)
class EvaluationResult:
    """Responses of all ranks, ordered by prompt and sample, with their scores. `_N` tensors are float32.

    Attributes:
        responses: the answers.
        rewards: raw scores by source.
        total_N: total score by the moments of the run's first evaluation; NaN for a dropped response.
        kl_N: nats per response against the reference, estimated from samples; None for greedy answers.
    """

    responses: list[Response]
    rewards: RewardOutputs
    total_N: Tensor
    kl_N: Tensor | None

    @property
    def samples(self) -> list[Sample]:
        """The responses as reward functions receive them."""
        return self.rewards.samples

    @property
    def reward_model_N(self) -> Tensor | None:
        """The first reward model's raw score."""
        return self.rewards.reward_model_N

    @property
    def function_N(self) -> Tensor | None:
        """The first function's or scorer's score, NaN without one."""
        return self.rewards.function_N

    @property
    def tokens_N(self) -> Tensor:
        """Response lengths in tokens."""
        return torch.tensor([float(len(r.tokens)) for r in self.responses])

    @property
    def truncated_N(self) -> Tensor:
        """1 for responses that reached the length limit, else 0."""
        return truncated_mask(self.responses).float()

    def evaluation(self, iteration: int) -> Evaluation:
        """Return the means as a metrics record. Requires sampled answers.

        Dropped responses count in the metrics of tokens, truncation and diversity only.
        """
        assert self.kl_N is not None
        kept_N = ~self.rewards.dropped_N
        return Evaluation(
            iteration=iteration,
            prompts=len({r.prompt_index for r in self.responses}),
            score_mean=float(self.total_N.nanmean()),
            reward_model_score_mean=None if self.reward_model_N is None else float(self.reward_model_N[kept_N].mean()),
            function_score_mean=None if self.function_N is None else float(self.function_N[kept_N].nanmean()),
            kl_nats_per_response=float(self.kl_N[kept_N].mean()),
            response_tokens_mean=float(self.tokens_N.mean()),
            truncated_fraction=float(self.truncated_N.mean()),
            distinct_fraction=distinct_fraction([s.text for s in self.samples]),
        )


class Evaluator:
    """Answers prompts with the actor and scores the answers with all sources. All ranks call it together."""

    def __init__(
        self,
        config: PPOConfig,
        engine: RolloutEngine,
        reward_computer: RewardComputer,
        normalizers: RunningScoreNormalizers,
        scorer: LogprobScorer,
        actor: Role,
        reference: Role,
        cluster: Cluster,
    ) -> None:
        self.config, self.engine, self.cluster = config, engine, cluster
        self.reward_computer, self.normalizers = reward_computer, normalizers
        self.scorer, self.actor, self.reference = scorer, actor, reference

    def __call__(self, prompts: Sequence[Prompt], samples: int = 1, *, greedy: bool = False) -> EvaluationResult:
        """Return `samples` scored answers per prompt, with KL unless `greedy`."""
        sampling = Sampling.of(self.config.sampling, self.config.run.seed ^ _EVALUATION_SEED)
        if greedy:
            sampling = dataclasses.replace(sampling, temperature=0.0)
        with self.actor.placement.hold(PARAMETERS):
            responses = self.engine.generate([p.tokens for p in prompts], samples, sampling)
        self.engine.release()
        plan = plan_batches(
            responses, self.config.token_budget, minibatch_by=self.config.minibatch_by, cluster=self.cluster
        )
        pending = self.reward_computer.start(plan, prompts)
        kl_N = None if greedy else self._kl(plan)
        rewards = pending.finish()
        scores = total_scores(
            self.config,
            self.normalizers.frozen(),
            rewards.models,
            rewards.source_total_N,
            truncated_mask(responses),
            lengths_N=torch.tensor([len(r.tokens) for r in responses]),
        )
        total_N = scores.total_N.masked_fill(rewards.dropped_N, torch.nan)
        return EvaluationResult(responses, rewards, total_N, kl_N)

    def _kl(self, plan: BatchPlan) -> Tensor:
        """Return log p_actor - log p_reference of each response, [N] nats in global order. Collective."""
        actor_A, _ = self.scorer(self.actor, plan.batches)
        reference_A, _ = self.scorer(self.reference, plan.batches)
        lengths_N = plan.cu_actions.diff().long()
        response_A = torch.arange(lengths_N.numel()).repeat_interleave(lengths_N)
        kl_N = torch.zeros(lengths_N.numel()).index_add(0, response_A, fetch(actor_A - reference_A))
        return plan.all_gather_sequences(kl_N)
