"""Asks every source of reward what responses are worth: reward models, functions and HTTP scorers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from icegrt.data import Prompt
from icegrt.distributed.cluster import Cluster
from icegrt.ppo.batch_plan import BatchPlan
from icegrt.ppo.scores import ModelScores
from icegrt.ppo.scoring import score_sequences
from icegrt.rewards.sample import Sample
from icegrt.rewards.sources import RewardSourceGroup, SourceScores
from icegrt.roles.role import Role
from icegrt.rollout.samples import sample_of


@dataclass(frozen=True)
class RewardModel:
    """A reward model at work: what its scores are logged under, and their weight once they are normalised."""

    name: str
    weight: float
    role: Role


@dataclass(frozen=True)
class RewardOutputs:
    """What was said of N responses, in their order. models: reward models; sources: functions and HTTP scorers."""

    samples: list[Sample]
    models: list[ModelScores]
    sources: list[SourceScores]

    @property
    def reward_model_N(self) -> Tensor | None:
        """The first reward model's raw score, [N] float32."""
        return self.models[0].score_N if self.models else None

    @property
    def function_N(self) -> Tensor | None:
        """The first function's or scorer's score, NaN where it has none: the metric that the run is watched by."""
        return torch.tensor(self.sources[0].scores, dtype=torch.float32) if self.sources else None

    @property
    def source_total_N(self) -> Tensor | None:
        """The weighted sum over functions and scorers; one that has no score for a response pays it nothing."""
        if not self.sources:
            return None
        said = [s.weight * torch.tensor(s.scores, dtype=torch.float32).nan_to_num(nan=0.0) for s in self.sources]
        return torch.stack(said).sum(0)

    @property
    def dropped_N(self) -> Tensor:
        """[N] bool: a source failed on the response, and `on_error` is to drop it."""
        dropped = torch.zeros(len(self.samples), dtype=torch.bool)
        for source in self.sources:
            left_out = [e is not None and r.score is None for e, r in zip(source.errors, source.results, strict=True)]
            dropped |= torch.tensor(left_out, dtype=torch.bool)
        return dropped

    @property
    def token_reward_A(self) -> Tensor | None:
        """[A] float32, the weighted sum of token rewards over the responses' tokens; None where no source gave any."""
        if all(r.token_rewards_A is None for source in self.sources for r in source.results):
            return None
        parts = [torch.zeros(len(sample.tokens)) for sample in self.samples]
        for source in self.sources:
            for part, result in zip(parts, source.results, strict=True):
                if result.token_rewards_A is not None:
                    part += source.weight * torch.tensor(result.token_rewards_A, dtype=torch.float32)
        return torch.cat(parts)

    def select(self, index: Sequence[int]) -> RewardOutputs:
        """The verdict on some responses, in the order of `index`."""
        sources = [
            replace(s, results=[s.results[i] for i in index], errors=[s.errors[i] for i in index]) for s in self.sources
        ]
        models = [replace(m, score_N=m.score_N[list(index)]) for m in self.models]
        return RewardOutputs([self.samples[i] for i in index], models, sources)

    def values(self) -> dict[str, dict[str, list[float]]]:
        """By source, then by name: `score` and the source's own metrics, of the responses that have them."""
        found: dict[str, dict[str, list[float]]] = {m.name: {"score": m.score_N.tolist()} for m in self.models}
        for source in self.sources:
            own = found[source.name] = {"score": [x for x in source.scores if not math.isnan(x)]}
            for result in source.results:
                for name, value in result.metrics.items():
                    own.setdefault(f"metrics/{name}", []).append(value)
        return found

    def errors(self) -> dict[str, int]:
        """By source: how many responses it failed on."""
        return {s.name: sum(error is not None for error in s.errors) for s in self.sources}


class RewardComputer:
    """`models`: any number of reward models; `reward_sources`: functions and HTTP scorers."""

    def __init__(self, models: Sequence[RewardModel], reward_sources: RewardSourceGroup, tokenizer: Any) -> None:
        self.models, self.reward_sources, self.tokenizer = models, reward_sources, tokenizer

    def __call__(self, plan: BatchPlan, prompts: Sequence[Prompt]) -> RewardOutputs:
        """What is said of everyone's responses, in their order; `prompts[r.prompt_index]` is what response r answers.

        A collective. Raises `RewardError`.
        """
        samples = [sample_of(self.tokenizer, r, prompts[r.prompt_index]) for r in plan.responses]
        models = [
            ModelScores(m.name, m.weight, plan.all_gather_sequences(score_sequences(m.role, plan.batches)))
            for m in self.models
        ]
        return RewardOutputs(samples, models, self._grade(plan, samples))

    def _grade(self, plan: BatchPlan, samples: list[Sample]) -> list[SourceScores]:
        """Data-parallel ranks ask about a part of the prompts each, all responses to a prompt together; of the ranks
        that hold one model only the first asks, and tells the others."""
        cluster = Cluster.current()
        if cluster.world_size == 1:
            return self.reward_sources.score(samples)
        ranks, rank = cluster.share.ranks, cluster.share.rank
        assignment = [[n for n, r in enumerate(plan.responses) if r.prompt_index % ranks == k] for k in range(ranks)]
        first = dist.get_process_group_ranks(cluster.model_group)[0]
        held: list[Any] = [None]
        if cluster.rank == first and assignment[rank]:
            held = [self.reward_sources.score([samples[n] for n in assignment[rank]])]
        dist.broadcast_object_list(held, first, group=cluster.model_group)
        parts: list[Any] = [None] * ranks
        dist.all_gather_object(parts, held[0], group=cluster.data_group)
        asked = [(part, where) for part, where in zip(parts, assignment, strict=True) if part]
        sources = range(len(asked[0][0])) if asked else ()
        return [_joined([(part[i], where) for part, where in asked], len(samples)) for i in sources]


def _joined(parts: list[tuple[SourceScores, list[int]]], count: int) -> SourceScores:
    """One source's answers from several ranks, each response's at its place."""
    results: list[Any] = [None] * count
    errors: list[str | None] = [None] * count
    for said, where in parts:
        for n, result, error in zip(where, said.results, said.errors, strict=True):
            results[n], errors[n] = result, error
    return replace(parts[0][0], results=results, errors=errors)
