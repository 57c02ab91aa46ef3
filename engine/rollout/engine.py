"""The rollout engine as a library: prompts in, responses out, from a model's weights in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from icegrt.data import stop_ids
from icegrt.data.types import Tokenizer
from icegrt.distributed.cluster import Cluster
from icegrt.model.language_model import LanguageModel
from icegrt.rollout.decoder import Decoder
from icegrt.rollout.gather import everyones, mine
from icegrt.rollout.types import Response, Sampling


class RolloutEngine:
    """Generates with a `LanguageModel` (see `icegrt.load_actor`) and its tokenizer.

    Prompts are token ids, or text, which is tokenised as it stands (apply a chat template beforehand). An answer ends
    with the tokenizer's EOS, what the model's configuration names, or one of `stop_token_ids`.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, *, max_batch: int = 256, stop_token_ids: Sequence[int] = ()
    ) -> None:
        self.tokenizer = tokenizer
        stops = stop_ids(tokenizer, model.architecture.hf_config, extra=stop_token_ids)
        self.decoder = Decoder(model, stops, max_batch)

    def stream(
        self,
        prompts: Sequence[str | Sequence[int]],
        n: int = 1,
        sampling: Sampling | None = None,
        *,
        first_sequence_id: int = 0,
    ) -> Iterator[Response]:
        """Yield `n` responses per prompt, each as soon as it is finished. Raises `DataError` for an empty prompt or
        one that leaves no room for the answer.

        Under torchrun all ranks iterate; data-parallel ranks draw a block together, and each is given all of it.
        """
        ids, sampling = self._ids(prompts), sampling or Sampling()
        ranks = Cluster.current().share.ranks
        if ranks == 1:
            yield from self.decoder.stream(ids, n, sampling, first_sequence_id)
            return
        pairs = _pairs(ids, n)
        block = self.decoder.max_batch * ranks
        for start in range(0, len(pairs), block):
            yield from self._together(ids, n, sampling, first_sequence_id, pairs[start : start + block])

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        n: int = 1,
        sampling: Sampling | None = None,
        *,
        first_sequence_id: int = 0,
    ) -> list[Response]:
        """All responses, ordered by prompt and sample. See `stream`."""
        ids = self._ids(prompts)
        return self._together(ids, n, sampling or Sampling(), first_sequence_id, _pairs(ids, n))

    def _together(
        self, ids: list[list[int]], n: int, sampling: Sampling, first_sequence_id: int, pairs: list[tuple[int, int]]
    ) -> list[Response]:
        # A rank without a sequence makes no forward pass, in which others would gather parameters together with it.
        self.decoder.model.wait_for_param_gather()
        own = mine(pairs, Cluster.current().share)
        return everyones(list(self.decoder.stream(ids, n, sampling, first_sequence_id, own)), ids, n, first_sequence_id)

    def _ids(self, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
        return [self.tokenizer(p)["input_ids"] if isinstance(p, str) else list(p) for p in prompts]

    def text(self, response: Response) -> str:
        """The answer as text, without special tokens."""
        return self.tokenizer.decode(response.tokens, skip_special_tokens=True)


def _pairs(prompts: Sequence[list[int]], samples: int) -> list[tuple[int, int]]:
    return [(p, s) for p in range(len(prompts)) for s in range(samples)]
