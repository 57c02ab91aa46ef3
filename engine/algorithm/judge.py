"""Asks every source of reward what responses are worth: the reward model, the Python function, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from icegrt.algorithm.experience import Planned, score_sequences
from icegrt.algorithm.reward_function import RewardFunction, Sample, call_reward_function
from icegrt.data import Prompt
from icegrt.roles.role import Role
from icegrt.rollout.response import Response


@dataclass(frozen=True)
class Verdict:
    """What the sources said of responses, in their order: raw scores, [N] float32, None for an absent source."""

    samples: list[Sample]
    reward_model_N: Tensor | None
    function_N: Tensor | None


class Judge:
    """`reward`: the reward model's role; `function`: the user's; either may be None."""

    def __init__(self, reward: Role | None, function: RewardFunction | None, tokenizer: Any) -> None:
        self.reward, self.function, self.tokenizer = reward, function, tokenizer

    def __call__(self, planned: Planned, prompts: Sequence[Prompt]) -> Verdict:
        """Score planned responses; `prompts[r.prompt_index]` is what response r answers. Raises `RewardError`."""
        samples = [self.sample(r, prompts[r.prompt_index]) for r in planned.responses]
        model_N = score_sequences(self.reward, planned.batches) if self.reward is not None else None
        function_N = None
        if self.function is not None:
            function_N = torch.tensor(call_reward_function(self.function, samples), dtype=torch.float32)
        return Verdict(samples, model_N, function_N)

    def sample(self, response: Response, prompt: Prompt) -> Sample:
        """A response as a reward function sees it: cut at the stop token first, scored after."""
        text = self.tokenizer.decode(response.tokens, skip_special_tokens=True)
        return Sample(
            text,
            list(response.tokens),  # copies: what a user's function does to them must not reach the update
            list(prompt.tokens),
            response.finish_reason,
            dict(prompt.row),
            prompt.where,
            response.prompt_index,
        )
