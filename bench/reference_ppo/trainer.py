"""One PPO iteration after another on four `transformers` models."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bench.reference_ppo.losses import answer_logprobs, gae, policy_loss, value_loss
from bench.reference_ppo.padding import Episode, PaddedBatch, left_padded, padded_batches, padding_fraction
from icegrt.config import OptimizerConfig, PPOConfig

Score = Callable[[Sequence[Episode]], list[float]]


@dataclass
class Iteration:
    """What an iteration computed; streams are lists over episodes of [tokens of the answer] float32.

    Attributes:
        episodes: prompts and answers.
        advantages, returns: per token; advantages before whitening.
        policy_losses, value_losses: means over the tokens of each optimizer step, before the step.
        seconds: by phase: rollout, score, shape, update.
    """

    episodes: list[Episode]
    advantages: list[Tensor] = field(default_factory=list)
    returns: list[Tensor] = field(default_factory=list)
    policy_losses: list[float] = field(default_factory=list)
    value_losses: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


class ReferencePPO:
    """PPO as a page of PyTorch.

    Args:
        config: the recipe. Read are kl_coef (in the reward, estimator k1), gamma, lam, whiten_advantages, the clips,
            ppo_epochs, minibatches, sampling, iterations and the two optimizers.
        actor, reference: causal language models of `transformers`.
        critic: a sequence classifier of `transformers` with one label; its `score` is the value head.
        score: the total score of each episode.
        pad_id: of the tokenizer.
        eos_ids: tokens that end an answer.
        rows: episodes of a padded batch, in rollout, scoring and update.
        by_length: scoring and update batch episodes of similar length.
        autocast: dtype of matrix products; the weights stay fp32. None: fp32.

    Attributes:
        on_phase_end: called with the name of each phase at its end, or None.
        padding_fraction: padding over all positions of the last iteration's batches in scoring and update.
    """

    def __init__(
        self,
        config: PPOConfig,
        actor: nn.Module,
        reference: nn.Module,
        critic: nn.Module,
        score: Score,
        *,
        pad_id: int,
        eos_ids: Sequence[int],
        rows: int,
        by_length: bool = False,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.config, self.score = config, score
        self.actor, self.reference, self.critic = actor.eval(), reference.eval(), critic.eval()
        self.pad_id, self.eos_ids, self.rows, self.by_length = pad_id, list(eos_ids), rows, by_length
        self.autocast = autocast
        self.on_phase_end: Callable[[str], None] | None = None
        self.padding_fraction = 0.0
        for model in (self.actor, self.critic):
            # `transformers` gives the pad token's row no gradient. Answers may contain the token, and EOS may be it.
            model.get_input_embeddings().padding_idx = None
        steps = config.iterations * config.ppo_epochs * config.minibatches
        self.actor_optimizer, self.actor_schedule = _adamw(self.actor, config.optimizer, steps)
        self.critic_optimizer, self.critic_schedule = _adamw(self.critic, config.critic.optimizer, steps)

    def step(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        episodes: Sequence[Episode] | None = None,
        order: Sequence[Sequence[int]] | None = None,
    ) -> Iteration:
        """Run an iteration.

        Args:
            prompts: token ids; each gets `samples_per_prompt` answers.
            episodes: answers to use instead of sampling any.
            order: episodes of each optimizer step; None: drawn.
        """
        seconds: dict[str, float] = {}
        with self._timed(seconds, "rollout"):
            result = Iteration(list(episodes) if episodes is not None else self._rollout(prompts), seconds=seconds)
        with self._timed(seconds, "score"):
            scores = self.score(result.episodes)
            batches = self.batches(result.episodes, range(len(scores)))
            self.padding_fraction = padding_fraction(batches)
            old, ref, values = self.infer(batches, len(scores))
        with self._timed(seconds, "shape"):
            for n, score in enumerate(scores):
                rewards = (-self.config.kl_coef * (old[n] - ref[n])).tolist()
                rewards[-1] += score
                result.advantages.append(
                    torch.tensor(gae(rewards, values[n].tolist(), self.config.gamma, self.config.lam))
                )
                result.returns.append(result.advantages[-1] + values[n])
            advantages = self._whitened(result.advantages)
        with self._timed(seconds, "update"):
            for members in order if order is not None else self._draw_order(len(scores)):
                batches = self.batches(result.episodes, members)
                result.policy_losses.append(self.actor_backward(batches, old, advantages))
                self._optimize(self.actor, self.actor_optimizer, self.actor_schedule, self.config.optimizer)
                result.value_losses.append(self.critic_backward(batches, values, result.returns))
                self._optimize(self.critic, self.critic_optimizer, self.critic_schedule, self.config.critic.optimizer)
        return result

    # -- phases ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _rollout(self, prompts: Sequence[Sequence[int]]) -> list[Episode]:
        sampling, episodes = self.config.sampling, []
        repeated = [list(prompt) for prompt in prompts for _ in range(self.config.samples_per_prompt)]
        for i in range(0, len(repeated), self.rows):
            batch = repeated[i : i + self.rows]
            tokens_NL, mask_NL = left_padded(batch, self.pad_id)
            with _autocast(self.autocast):
                out_NL = self.actor.generate(
                    tokens_NL,
                    attention_mask=mask_NL,
                    do_sample=True,
                    temperature=sampling.temperature,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=sampling.max_new_tokens,
                    pad_token_id=self.pad_id,
                    eos_token_id=self.eos_ids,
                )
            for prompt, row in zip(batch, out_NL[:, tokens_NL.shape[1] :].tolist(), strict=True):
                end = next((t for t, token in enumerate(row) if token in self.eos_ids), None)
                answer = row if end is None else row[: end + 1]
                episodes.append(Episode(prompt, answer, truncated=end is None))
        return episodes

    @torch.no_grad()
    def infer(self, batches: Sequence[PaddedBatch], count: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return log-probs under actor and reference and values of the answers' tokens of `count` episodes."""
        columns: tuple[list[Tensor], ...] = tuple([torch.empty(0)] * count for _ in range(3))
        for batch in batches:
            streams = self._logprobs(self.actor, batch), self._logprobs(self.reference, batch), self._values(batch)
            for column, x_NL in zip(columns, streams, strict=True):
                for row, n in enumerate(batch.members):
                    column[n] = x_NL[row][batch.answer_NL[row]]
        return columns[0], columns[1], columns[2]

    def _whitened(self, advantages: list[Tensor]) -> list[Tensor]:
        if not self.config.whiten_advantages:
            return advantages
        everything = torch.cat(advantages)
        mean, variance = everything.mean(), everything.var(unbiased=False)
        return [(x - mean) * torch.rsqrt(variance + 1e-8) for x in advantages]

    def _draw_order(self, count: int) -> Iterator[list[int]]:
        for _ in range(self.config.ppo_epochs):
            for part in torch.randperm(count).chunk(self.config.minibatches):
                yield part.tolist()

    def actor_backward(self, batches: Sequence[PaddedBatch], old: list[Tensor], advantages: list[Tensor]) -> float:
        """Leave the gradients of the policy loss in the actor.

        Args:
            batches: of an optimizer step.
            old, advantages: of every episode, [tokens of the answer] each.

        Returns:
            The mean loss over the tokens of all batches.
        """

        def loss(batch: PaddedBatch) -> Tensor:
            logprob = self._logprobs(self.actor, batch)[batch.answer_NL]
            return policy_loss(
                logprob, _joined(old, batch), _joined(advantages, batch), self.config.clip_low, self.config.clip_high
            )

        return _backward(self.actor, batches, loss)

    def critic_backward(self, batches: Sequence[PaddedBatch], values: list[Tensor], returns: list[Tensor]) -> float:
        """Leave the gradients of the value loss in the critic, as `actor_backward` those of the policy loss."""

        def loss(batch: PaddedBatch) -> Tensor:
            value = self._values(batch)[batch.answer_NL]
            return value_loss(value, _joined(values, batch), _joined(returns, batch), self.config.value_clip)

        return _backward(self.critic, batches, loss)

    @staticmethod
    def _optimize(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        config: OptimizerConfig,
    ) -> None:
        if config.clip_grad:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
        optimizer.step()
        schedule.step()

    def batches(self, episodes: Sequence[Episode], members: Sequence[int]) -> list[PaddedBatch]:
        """Return the episodes `members` in padded batches of `rows`."""
        return padded_batches(episodes, members, self.rows, self.pad_id, by_length=self.by_length)

    @contextlib.contextmanager
    def _timed(self, seconds: dict[str, float], phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        seconds[phase] = time.perf_counter() - begin
        if self.on_phase_end is not None:
            self.on_phase_end(phase)

    # -- models ----------------------------------------------------------------------------------------------------

    def _logprobs(self, model: nn.Module, batch: PaddedBatch) -> Tensor:
        with _autocast(self.autocast):
            logits_NLV = model(input_ids=batch.tokens_NL, attention_mask=batch.attention_NL, use_cache=False).logits
        return answer_logprobs(logits_NLV, batch.tokens_NL, self.config.sampling.temperature)

    def _values(self, batch: PaddedBatch) -> Tensor:
        with _autocast(self.autocast):
            hidden_NLH = self.critic.model(
                input_ids=batch.tokens_NL, attention_mask=batch.attention_NL, use_cache=False
            ).last_hidden_state
        return (hidden_NLH[:, :-1].float() @ self.critic.score.weight.float().t()).squeeze(-1)


def reward_model_score(model: nn.Module, rows: int, pad_id: int, autocast: torch.dtype | None = None) -> Score:
    """Return the score function of a sequence classifier: its score at an episode's last token."""

    @torch.no_grad()
    def score(episodes: Sequence[Episode]) -> list[float]:
        scores = [0.0] * len(episodes)
        for batch in padded_batches(episodes, range(len(episodes)), rows, pad_id):
            with _autocast(autocast):
                hidden_NLH = model.model(
                    input_ids=batch.tokens_NL, attention_mask=batch.attention_NL, use_cache=False
                ).last_hidden_state
            last_NH = hidden_NLH[torch.arange(len(batch.members)), batch.last_N]
            for n, value in zip(batch.members, (last_NH.float() @ model.score.weight.float().t()).squeeze(-1)):
                scores[n] = value.item()
        return scores

    return score


def _autocast(dtype: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    return torch.autocast("cpu", dtype) if dtype is not None else contextlib.nullcontext()


def _adamw(
    model: nn.Module, config: OptimizerConfig, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
    decay = {"constant": lambda step: 1.0, "linear": lambda step: max(0.0, 1 - step / steps)}[config.schedule]
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, decay)


def _backward(model: nn.Module, batches: Sequence[PaddedBatch], loss: Callable[[PaddedBatch], Tensor]) -> float:
    """Leave the gradients of the mean of `loss` over the tokens of all batches in the model. Returns that mean."""
    tokens = sum(int(batch.answer_NL.sum()) for batch in batches)
    model.zero_grad()
    total = 0.0
    for batch in batches:
        part = loss(batch).sum() / tokens
        part.backward()
        total += part.item()
    return total


def _joined(streams: list[Tensor], batch: PaddedBatch) -> Tensor:
    """Return the members' entries in the order of `x[batch.answer_NL]`."""
    return torch.cat([streams[n] for n in batch.members])
