"""Held-out answers, scored: sampled with a fixed seed (before and after share the noise), or greedy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from icegrt.config import PPOConfig
from icegrt.data import Prompt
from icegrt.distributed.cluster import Cluster
from icegrt.metrics import Evaluation
from icegrt.metrics.statistics import distinct_fraction
from icegrt.ppo.batch_plan import BatchPlan, plan_batches
from icegrt.ppo.rewards import RewardComputer, RewardOutputs
from icegrt.ppo.scores import RunningScoreNormalizers, total_scores
from icegrt.ppo.scoring import score_logprobs
from icegrt.rewards.sample import Sample
from icegrt.roles.role import Role
from icegrt.rollout.engine import RolloutEngine
from icegrt.rollout.types import Response, Sampling

# Keeps evaluation's noise apart from training's, whatever the seed of the run.
_EVALUATION_SEED = 0x1CE


@dataclass(frozen=True)
class EvaluationResult:
    """Responses ordered by prompt and sample, with everything known of them; `_N` tensors are float32, raw scores.

    The total of a response is NaN where a source failed on it and it is dropped. kl_N estimates the KL against the
    reference from samples, so greedy answers have none (None).
    """

    responses: list[Response]
    rewards: RewardOutputs
    total_N: Tensor
    kl_N: Tensor | None

    @property
    def samples(self) -> list[Sample]:
        return self.rewards.samples

    @property
    def reward_model_N(self) -> Tensor | None:
        return self.rewards.reward_model_N

    @property
    def function_N(self) -> Tensor | None:
        return self.rewards.function_N

    @property
    def tokens_N(self) -> Tensor:
        return torch.tensor([float(len(r.tokens)) for r in self.responses])

    @property
    def truncated_N(self) -> Tensor:
        return torch.tensor([float(r.truncated) for r in self.responses])

    def evaluation(self, iteration: int) -> Evaluation:
        """The means that go into the metrics. Only of sampled answers."""
        assert self.kl_N is not None
        return Evaluation(
            iteration=iteration,
            prompts=len({r.prompt_index for r in self.responses}),
            score_mean=float(self.total_N.nanmean()),
            reward_model_score_mean=None if self.reward_model_N is None else float(self.reward_model_N.mean()),
            function_score_mean=None if self.function_N is None else float(self.function_N.nanmean()),
            kl_nats_per_response=float(self.kl_N.mean()),
            response_tokens_mean=float(self.tokens_N.mean()),
            truncated_fraction=float(self.truncated_N.mean()),
            distinct_fraction=distinct_fraction([s.text for s in self.samples]),
        )


class Evaluator:
    """Answers prompts with the actor and has every role judge the answers."""

    def __init__(
        self,
        config: PPOConfig,
        engine: RolloutEngine,
        reward_computer: RewardComputer,
        actor: Role,
        reference: Role,
        chunk_rows: int,
    ) -> None:
        self.config, self.engine, self.reward_computer = config, engine, reward_computer
        self.actor, self.reference, self.chunk_rows = actor, reference, chunk_rows

    def __call__(
        self, prompts: Sequence[Prompt], normalizers: RunningScoreNormalizers, samples: int = 1, *, greedy: bool = False
    ) -> EvaluationResult:
        sampling = Sampling.of(self.config.sampling, self.config.run.seed ^ _EVALUATION_SEED)
        if greedy:
            sampling = dataclasses.replace(sampling, temperature=0.0)
        responses = self.engine.generate([p.tokens for p in prompts], samples, sampling)
        plan = plan_batches(responses, self.config.token_budget, share=Cluster.current().share)
        rewards = self.reward_computer(plan, prompts)
        truncated_N = torch.tensor([float(r.truncated) for r in responses])
        # Responses come ordered by prompt and sample, and so does all that is said of them.
        scores = total_scores(self.config, normalizers, rewards.models, rewards.source_total_N, truncated_N)
        total_N = scores.total_N.masked_fill(rewards.dropped_N, torch.nan)
        return EvaluationResult(responses, rewards, total_N, None if greedy else self._kl(plan))

    def _kl(self, plan: BatchPlan) -> Tensor:
        """Nats by which each response is likelier under the actor than under the reference, [N] in their own order."""
        ours_A, theirs_A = (
            score_logprobs(role, plan.batches, self.config.sampling.temperature, self.chunk_rows)[0]
            for role in (self.actor, self.reference)
        )
        kl_N = torch.zeros(len(plan.local_responses)).index_add(0, _owner_A(plan.cu_actions), ours_A - theirs_A)
        return plan.all_gather_sequences(kl_N)


def _owner_A(cu_actions: Tensor) -> Tensor:
    lengths = cu_actions.diff().long()
    return torch.arange(lengths.numel()).repeat_interleave(lengths)
