"""Score responses with every source of reward: reward models, functions and HTTP scorers."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from icegrt.data import Prompt
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.pipeline import fetch
from icegrt.errors import RewardError
from icegrt.ppo.batch_plan import BatchPlan
from icegrt.ppo.scores import ModelScores
from icegrt.ppo.scoring import score_sequences
from icegrt.rewards.function import start_daemon
from icegrt.rewards.sample import Sample
from icegrt.rewards.sources import RewardSourceGroup, SourceScores
from icegrt.roles.role import Role
from icegrt.rollout.samples import sample_of


@dataclass(frozen=True)
class RewardModel:
    """A loaded reward model: the name its scores are logged under, and the weight of its normalised scores."""

    name: str
    weight: float
    role: Role


@dataclass(frozen=True)
class RewardOutputs:
    """Scores of N responses, in their order.

    Attributes:
        samples: the responses as reward functions receive them.
        models: raw scores of each reward model.
        sources: results and errors of each function and HTTP scorer.
        source_seconds: how long this rank's functions and scorers took, beside inference.
        wait_seconds: how long the models waited for those of all ranks.
    """

    samples: list[Sample]
    models: list[ModelScores]
    sources: list[SourceScores]
    source_seconds: float = 0.0
    wait_seconds: float = 0.0

    @property
    def reward_model_N(self) -> Tensor | None:
        """The first reward model's raw score, [N] float32."""
        return self.models[0].score_N if self.models else None

    @property
    def function_N(self) -> Tensor | None:
        """The first function's or scorer's score, [N] float32, NaN without one: the metric that alarms watch."""
        return torch.tensor(self.sources[0].score_or_nan_N, dtype=torch.float32) if self.sources else None

    @property
    def source_total_N(self) -> Tensor | None:
        """The weighted sum over functions and scorers, [N] float32; a missing score counts as 0."""
        if not self.sources:
            return None
        weighted = [
            s.weight
            * torch.tensor(s.score_or_nan_N, dtype=torch.float32).nan_to_num(
                nan=0.0, posinf=torch.inf, neginf=-torch.inf
            )
            for s in self.sources
        ]
        return torch.stack(weighted).sum(0)

    @property
    def dropped_N(self) -> Tensor:
        """[N] bool: a source failed on the response, and `on_error` is `drop`."""
        dropped = torch.zeros(len(self.samples), dtype=torch.bool)
        for source in self.sources:
            failed = [e is not None and r.score is None for e, r in zip(source.errors, source.results, strict=True)]
            dropped |= torch.tensor(failed, dtype=torch.bool)
        return dropped

    @property
    def token_reward_A(self) -> Tensor | None:
        """The weighted sum of token rewards, [A] float32 over all tokens; None if no source returned any."""
        if all(r.token_rewards_A is None for source in self.sources for r in source.results):
            return None
        parts = [torch.zeros(len(sample.tokens)) for sample in self.samples]
        for source in self.sources:
            for part, result in zip(parts, source.results, strict=True):
                if result.token_rewards_A is not None:
                    part += source.weight * torch.tensor(result.token_rewards_A, dtype=torch.float32)
        return torch.cat(parts)

    def select(self, index: Sequence[int]) -> RewardOutputs:
        """Return the scores of the responses `index`, in that order."""
        sources = [
            replace(s, results=[s.results[i] for i in index], errors=[s.errors[i] for i in index]) for s in self.sources
        ]
        models = [replace(m, score_N=m.score_N[list(index)]) for m in self.models]
        return replace(self, samples=[self.samples[i] for i in index], models=models, sources=sources)

    @classmethod
    def concatenate(cls, parts: Sequence[RewardOutputs]) -> RewardOutputs:
        """Return the scores of several lists of responses, one after another; times add up."""
        sources, models = parts[0].sources, parts[0].models
        for part in parts[1:]:
            sources = [
                replace(s, results=[*s.results, *more.results], errors=[*s.errors, *more.errors])
                for s, more in zip(sources, part.sources, strict=True)
            ]
        return cls(
            [sample for p in parts for sample in p.samples],
            [replace(m, score_N=torch.cat([p.models[i].score_N for p in parts])) for i, m in enumerate(models)],
            sources,
            sum(p.source_seconds for p in parts),
            sum(p.wait_seconds for p in parts),
        )

    def values(self) -> dict[str, dict[str, list[float]]]:
        """Return by source, then by metric, the values of the responses that have one: `score`, `metrics/NAME`.

        Dropped responses have none.
        """
        kept_N = ~self.dropped_N
        kept = kept_N.tolist()
        values: dict[str, dict[str, list[float]]] = {m.name: {"score": m.score_N[kept_N].tolist()} for m in self.models}
        for source in self.sources:
            scores = [
                x for x, is_kept in zip(source.score_or_nan_N, kept, strict=True) if is_kept and not math.isnan(x)
            ]
            metrics = values[source.name] = {"score": scores}
            for result, is_kept in zip(source.results, kept, strict=True):
                for name, value in result.metrics.items() if is_kept else ():
                    metrics.setdefault(f"metrics/{name}", []).append(value)
        return values

    def errors(self) -> dict[str, int]:
        """Return by source the number of responses that it failed on."""
        return {s.name: sum(error is not None for error in s.errors) for s in self.sources}


class PendingRewards:
    """Scores of which those of functions and HTTP scorers may still be on their way; `finish` returns all.

    They run in a thread beside the caller, unless a function needs the main thread: it then runs in `finish`.

    Args:
        computer: the sources.
        plan: the responses.
        samples: the responses as the sources receive them.
    """

    def __init__(self, computer: RewardComputer, plan: BatchPlan, samples: list[Sample]) -> None:
        self._computer, self._plan, self._samples = computer, plan, samples
        self._models: list[ModelScores] = []
        self._seconds = 0.0
        self._future = None
        if computer.reward_sources and not computer.reward_sources.needs_main_thread:
            self._future = start_daemon("reward sources", self._call_sources)

    def score_with_models(self) -> None:
        """Run the reward models. Collective."""
        roles = self._computer.models
        scores = fetch([score_sequences(m.role, self._plan.batches) for m in roles])
        self._models = [
            ModelScores(m.name, m.weight, self._plan.all_gather_sequences(score_N))
            for m, score_N in zip(roles, scores, strict=True)
        ]

    def finish(self) -> RewardOutputs:
        """Wait for the functions and scorers, and return all scores of all ranks, in global order. Collective.

        Raises:
            RewardError: a source failed, and `on_error` is `stop`; or a score is not finite in fp32.
        """
        samples = self._samples
        for model in self._models:
            finite_N = model.score_N.isfinite()
            _check_scores(model.name, model.score_N, finite_N, samples, "check the reward model's weights")
        started = time.perf_counter()
        local_scores = self._call_sources() if self._future is None else self._future.result()
        sources = self._computer.gather_sources(self._plan, samples, local_scores)
        waited = time.perf_counter() - started
        outputs = RewardOutputs(samples, self._models, sources, self._seconds, waited)
        for source in outputs.sources:  # NaN: no score
            score_N = torch.tensor(source.score_or_nan_N, dtype=torch.float32)
            _check_scores(source.name, score_N, ~score_N.isinf(), samples, "fp32 ends at 3.4e38, so scale the scores")
        total_N = outputs.source_total_N
        if total_N is not None:
            _check_scores("weighted sum", total_N, total_N.isfinite(), samples, "lower the weights of the sources")
        return outputs

    def _call_sources(self) -> list[SourceScores] | None:
        """Return the sources' scores of this rank's part of the samples; None if it has none."""
        members = self._computer.source_members(self._plan, self._samples)
        started = time.perf_counter()
        scores = None
        if members is not None:
            scores = self._computer.reward_sources.score_by_source([self._samples[n] for n in members])
        self._seconds = time.perf_counter() - started
        return scores


class RewardComputer:
    """Scores the responses of all ranks.

    models: any number of reward models. reward_sources: functions and HTTP scorers.
    """

    def __init__(
        self, models: Sequence[RewardModel], reward_sources: RewardSourceGroup, tokenizer: Any, cluster: Cluster
    ) -> None:
        self.models, self.reward_sources = models, reward_sources
        self.tokenizer, self.cluster = tokenizer, cluster

    def __call__(self, plan: BatchPlan, prompts: Sequence[Prompt]) -> RewardOutputs:
        """Score all responses of all ranks, in global order. Collective.

        Args:
            plan: the responses; reward models read its micro-batches.
            prompts: response r answers `prompts[r.prompt_index]`.

        Raises:
            RewardError: a source failed, and `on_error` is `stop`; or a score is not finite in fp32.
        """
        return self.start(plan, prompts).finish()

    def start(self, plan: BatchPlan, prompts: Sequence[Prompt]) -> PendingRewards:
        """Start the functions and HTTP scorers, and run the reward models beside them; arguments as above. Collective.

        The caller may compute on until it calls `finish()`.
        """
        samples = [sample_of(self.tokenizer, r, prompts[r.prompt_index]) for r in plan.responses]
        pending = PendingRewards(self, plan, samples)
        pending.score_with_models()
        return pending

    def _assignment(self, plan: BatchPlan, samples: list[Sample]) -> list[list[int]]:
        """Return for each data-parallel rank the responses that its sources score: all responses to a prompt.

        Equal prompts of several rows are one prompt, as in one process.
        """
        owner: dict[tuple[int, ...], int] = {}
        assignment: list[list[int]] = [[] for _ in range(self.cluster.share.ranks)]
        for n, (sample, response) in enumerate(zip(samples, plan.responses, strict=True)):
            rank = owner.setdefault(tuple(sample.prompt_tokens), response.prompt_index % len(assignment))
            assignment[rank].append(n)
        return assignment

    def source_members(self, plan: BatchPlan, samples: list[Sample]) -> list[int] | None:
        """Return the responses that this rank's sources score; None if there are none, or another rank does it."""
        members = self._assignment(plan, samples)[self.cluster.share.rank]
        # Of the ranks that hold one model together the first calls the sources.
        is_first = self.cluster.rank == dist.get_process_group_ranks(self.cluster.model_group)[0]
        return members if is_first and (members or self.cluster.world_size == 1) else None

    def gather_sources(
        self, plan: BatchPlan, samples: list[Sample], scores: list[SourceScores] | None
    ) -> list[SourceScores]:
        """Return every source's scores of all responses from those of each rank. Collective."""
        cluster = self.cluster
        if cluster.world_size == 1:
            return scores or []
        cluster.barrier()  # sources may take as long as they need
        message = [scores]
        dist.broadcast_object_list(
            message, dist.get_process_group_ranks(cluster.model_group)[0], group=cluster.model_group
        )
        scores_by_rank: list[Any] = [None] * cluster.share.ranks
        dist.all_gather_object(scores_by_rank, message[0], group=cluster.data_group)
        pairs = zip(scores_by_rank, self._assignment(plan, samples), strict=True)
        parts = [(scores, indices) for scores, indices in pairs if scores]
        sources = range(len(parts[0][0])) if parts else ()
        return [_merge([(scores[i], indices) for scores, indices in parts], len(samples)) for i in sources]


def _check_scores(name: str, score_N: Tensor, valid_N: Tensor, samples: Sequence[Sample], remedy: str) -> None:
    """Raise `RewardError` for the first score that is not valid; it names the source and the row.

    Args:
        name: of the source.
        score_N: [N] float32.
        valid_N: [N] bool.
        samples: the responses.
        remedy: the end of the message.
    """
    if bool(valid_N.all()):
        return
    invalid = (~valid_N).nonzero().flatten().tolist()
    raise RewardError(
        f"`{name}`: {samples[invalid[0]].where}: the score of a response is {float(score_N[invalid[0]])}, not a finite "
        f"number ({len(invalid)} of {len(samples)} scores); {remedy}"
    )


def _merge(parts: list[tuple[SourceScores, list[int]]], count: int) -> SourceScores:
    """Merge one source's scores from several ranks, each with the indices of its responses among all `count`."""
    results: list[Any] = [None] * count
    errors: list[str | None] = [None] * count
    for scores, indices in parts:
        for n, result, error in zip(indices, scores.results, scores.errors, strict=True):
            results[n], errors[n] = result, error
    return replace(parts[0][0], results=results, errors=errors)
