"""The reference path's forward and backward pass beside bare `transformers` and PyTorch on the same padded batch.

The reference path is a fair opponent if what it adds to `transformers` costs next to nothing: 5% at the most. Old
log-probs and values are those of the model, so the clipped losses have the gradients of a weighted cross-entropy and of
half a squared error, which is what the bare passes compute. Gradients are compared before anything is timed.

    python -m bench.reference_ppo.bench_bare
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import harness
from bench.end_to_end.recipe import ppo_config
from bench.end_to_end.workloads import FIRST_WORD, PAD, WORKLOADS, Workload
from bench.reference_ppo.padding import Episode, PaddedBatch
from bench.reference_ppo.trainer import ReferencePPO, reward_model_score

BENCH = "reference_bare"
ROWS, TOLERANCE, TARGET = 16, 1e-4, 1.05
Gradients = list[Tensor]


@dataclass(frozen=True)
class Case:
    """A batch of one workload, with what its losses read.

    Attributes:
        path: the reference path with its models.
        batch: N episodes, padded to L tokens.
        old, values: log-probs and values of each answer's tokens under the models.
        advantages, returns: of each answer's tokens.
    """

    path: ReferencePPO
    batch: PaddedBatch
    old: list[Tensor]
    values: list[Tensor]
    advantages: list[Tensor]
    returns: list[Tensor]

    @classmethod
    def of(cls, workload: Workload, rows: int) -> Case:
        """Return a batch of the workload's first prompts with random answers."""
        draw, first = random.Random(1), FIRST_WORD + workload.stop_tokens
        episodes = []
        for prompt in workload.prompt_ids()[:rows]:
            length = draw.randint(workload.answer_tokens // 2, workload.answer_tokens)
            episodes.append(Episode(prompt, [draw.randrange(first, workload.vocab) for _ in range(length)], True))
        actor, critic = workload.actor(), workload.reward_model()
        config = ppo_config(workload, "unused")
        score = reward_model_score(critic, rows, PAD)
        path = ReferencePPO(
            config, actor, actor, critic, score, pad_id=PAD, eos_ids=workload.stop_ids, rows=len(episodes)
        )
        batches = path.batches(episodes, range(len(episodes)))
        old, _, values = path.infer(batches, len(episodes))
        generator = torch.Generator().manual_seed(2)
        advantages = [torch.randn(x.shape, generator=generator) for x in old]
        returns = [torch.randn(x.shape, generator=generator) for x in old]
        return cls(path, batches[0], old, values, advantages, returns)

    def weights(self) -> Tensor:
        """Return each next token's share of the mean loss, [N, L - 1] float32; 0 at prompts and padding."""
        return self.batch.answer_NL / self.batch.answer_NL.sum()

    def spread(self, streams: list[Tensor]) -> Tensor:
        """Return streams of the answers at their positions, [N, L - 1] float32; 0 elsewhere."""
        x_NL = torch.zeros(self.batch.answer_NL.shape)
        x_NL[self.batch.answer_NL] = torch.cat(streams)
        return x_NL


def bare_policy(model: nn.Module, case: Case) -> Gradients:
    """Return the gradients of a causal model's cross-entropy, weighted by the advantages."""
    batch = case.batch
    model.zero_grad()
    logits_NLV = model(input_ids=batch.tokens_NL, attention_mask=batch.attention_NL, use_cache=False).logits
    losses = F.cross_entropy(logits_NLV[:, :-1].flatten(0, 1), batch.tokens_NL[:, 1:].flatten(), reduction="none")
    (losses * (case.weights() * case.spread(case.advantages)).flatten()).sum().backward()
    return gradients(model)


def bare_value(model: nn.Module, case: Case) -> Gradients:
    """Return the gradients of half the squared error of a sequence classifier's scores at each position."""
    batch = case.batch
    model.zero_grad()
    hidden_NLH = model.model(
        input_ids=batch.tokens_NL, attention_mask=batch.attention_NL, use_cache=False
    ).last_hidden_state
    value_NL = model.score(hidden_NLH[:, :-1]).squeeze(-1)
    (0.5 * (value_NL - case.spread(case.returns)) ** 2 * case.weights()).sum().backward()
    return gradients(model)


def reference_policy(case: Case) -> Gradients:
    """Return the gradients of the reference path's policy loss."""
    case.path.actor_backward([case.batch], case.old, case.advantages)
    return gradients(case.path.actor)


def reference_value(case: Case) -> Gradients:
    """Return the gradients of the reference path's value loss."""
    case.path.critic_backward([case.batch], case.values, case.returns)
    return gradients(case.path.critic)


def gradients(model: nn.Module) -> Gradients:
    """Return the gradients of all trained parameters."""
    return [p.grad for p in model.parameters() if p.grad is not None]


def relative_gap(found: Iterable[Tensor], expected: Gradients) -> float:
    """Return the norm of the difference of all gradients over that of the expected ones."""
    gap = sum(float(((a.double() - b) ** 2).sum()) for a, b in zip(found, expected, strict=True))
    return (gap / sum(float((b**2).sum()) for b in expected)) ** 0.5


def passes(case: Case) -> dict[str, tuple[dict[str, Callable[[], Gradients]], Gradients]]:
    """Return, for actor and critic, the calls to compare and the gradients of the bare pass in fp64."""
    found = {}
    for role, model, reference, bare in (
        ("actor", case.path.actor, reference_policy, bare_policy),
        ("critic", case.path.critic, reference_value, bare_value),
    ):
        expected = [g.clone() for g in bare(copy.deepcopy(model).double(), case)]
        calls = {
            "reference path": lambda reference=reference: reference(case),
            "bare transformers": lambda bare=bare, model=model: bare(model, case),
        }
        found[role] = (calls, expected)
    return found


def main() -> None:
    """Run the bench."""
    options = harness.arguments(__doc__, workloads=("uniform", "long-tail", "8-samples"))
    if options.device != "cpu":
        print(f"{BENCH}: left out, the reference path runs on CPUs (--device cpu)")
        return
    rows = []
    for name in options.workloads[:1] if options.quick else options.workloads:
        workload = WORKLOADS[name]
        case = Case.of(workload, 4 if options.quick else ROWS)
        for role, (calls, expected) in passes(case).items():
            made = harness.compare(
                BENCH,
                f"{name} {role}",
                calls,
                error=lambda found, expected=expected: relative_gap(found, expected),
                tolerance=TOLERANCE,
                rounds=options.rounds,
                device=options.device,
            )
            medians = {row["provider"]: row["median"] for row in made}
            quotient = medians["reference path"] / medians["bare transformers"]
            print(f"  {name} {role}: reference path / bare transformers {quotient:.3f}, target <= {TARGET}")
            rows += made
    harness.write(BENCH, rows, options)


if __name__ == "__main__":
    main()
