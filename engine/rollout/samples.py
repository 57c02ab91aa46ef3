"""A response as the sample that reward functions are given."""

from __future__ import annotations

from icegrt.data import Prompt
from icegrt.data.types import Tokenizer
from icegrt.rewards.sample import Sample
from icegrt.rollout.types import Response


def sample_of(tokenizer: Tokenizer, response: Response, prompt: Prompt) -> Sample:
    """A response as a reward function sees it: cut at the stop token first, scored after."""
    return Sample(
        text=tokenizer.decode(response.tokens, skip_special_tokens=True),
        tokens=list(response.tokens),  # copies: what a user's function does to them must not reach the update
        prompt=tokenizer.decode(prompt.tokens, skip_special_tokens=False),
        prompt_tokens=list(prompt.tokens),
        finish_reason=response.finish_reason,
        row=dict(prompt.row),
        where=prompt.where,
        group=response.prompt_index,
        index=response.sample,
    )
