"""The rollout engine as a library: prompts in, responses out, from a model's weights in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from icegrt.data import stop_ids
from icegrt.model.language_model import LanguageModel
from icegrt.rollout.decoder import Decoder
from icegrt.rollout.response import Response, Sampling


class RolloutEngine:
    """Generates with a `LanguageModel` (see `icegrt.load_actor`) and its tokenizer.

    Prompts are token ids, or text, which is tokenised as it stands (apply a chat template beforehand). An answer ends
    with the tokenizer's EOS, what the model's configuration names, or one of `stop_token_ids`.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Any, *, max_batch: int = 256, stop_token_ids: Sequence[int] = ()
    ) -> None:
        self.tokenizer = tokenizer
        stops = stop_ids(tokenizer, model.architecture.hf_config, extra=stop_token_ids)
        self.decoder = Decoder(model, stops, max_batch)

    def stream(
        self,
        prompts: Sequence[str | list[int]],
        n: int = 1,
        sampling: Sampling | None = None,
        *,
        first_sequence_id: int = 0,
    ) -> Iterator[Response]:
        """Yield `n` responses per prompt, each as soon as it is finished. Raises `DataError` for an empty prompt or
        one that leaves no room for the answer."""
        ids = [self.tokenizer(p)["input_ids"] if isinstance(p, str) else list(p) for p in prompts]
        yield from self.decoder.stream(ids, n, sampling or Sampling(), first_sequence_id)

    def generate(self, prompts: Sequence[str | list[int]], n: int = 1, sampling: Sampling | None = None, **kwargs):
        """All responses, ordered by prompt and sample. See `stream`."""
        return sorted(self.stream(prompts, n, sampling, **kwargs), key=lambda r: (r.prompt_index, r.sample))

    def text(self, response: Response) -> str:
        """The answer as text, without special tokens."""
        return self.tokenizer.decode(response.tokens, skip_special_tokens=True)
