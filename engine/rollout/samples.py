"""Convert a response into the sample that reward functions receive."""

from __future__ import annotations

from icegrt.data import Prompt
from icegrt.data.types import Tokenizer
from icegrt.rewards.sample import Sample
from icegrt.rollout.types import Response


def sample_of(tokenizer: Tokenizer, response: Response, prompt: Prompt) -> Sample:
    """Return a response as a reward function receives it, decoded up to its stop token."""
    return Sample(
        text=tokenizer.decode(response.tokens, skip_special_tokens=True),
        tokens=list(response.tokens),  # a copy: a reward function may change it, and the update must not see that
        prompt=tokenizer.decode(prompt.tokens, skip_special_tokens=False),
        prompt_tokens=list(prompt.tokens),
        finish_reason="length" if response.truncated else "stop",
        row=dict(prompt.row),
        where=prompt.where,
        group=response.prompt_index,
        index=response.sample,
        columns=tuple(prompt.schema.columns),
        is_chat=prompt.schema.is_chat,
    )
