"""The rollout engine as a library: prompts in, responses out, with a model's weights in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from icegrt.data import stop_ids
from icegrt.data.tokenization import plain_prompt_tokens
from icegrt.data.tokenizer import check_vocabulary
from icegrt.data.types import Tokenizer
from icegrt.model.pipeline_model import PipelineModel
from icegrt.rollout.decoder import Decoder, Pair
from icegrt.rollout.gather import all_gather_responses, rank_slice
from icegrt.rollout.types import Response, Sampling


class RolloutEngine:
    """Generates responses with a model and its tokenizer.

    A response ends with the tokenizer's EOS, an EOS of the model's configuration or generation configuration, or one of
    `stop_token_ids`. Ids beyond the tokenizer, which pad the vocabulary of many models, are never sampled: the engine
    limits the vocabulary of `model` to the tokenizer.

    Args:
        model: a model of `icegrt.load_actor`, or of a role.
        tokenizer: its `transformers` tokenizer.
        max_batch: number of sequences that a rank decodes together.
        stop_token_ids: more token ids that end a response.

    Raises:
        ConfigError: the tokenizer has more tokens than the model.
        DataError: there is no stop token.
    """

    def __init__(
        self, model: PipelineModel, tokenizer: Tokenizer, *, max_batch: int = 256, stop_token_ids: Sequence[int] = ()
    ) -> None:
        self.tokenizer = tokenizer
        architecture = model.architecture
        check_vocabulary(tokenizer, architecture.vocab_size)
        stops = stop_ids(
            tokenizer,
            architecture.hf_config,
            extra=stop_token_ids,
            generation_config=architecture.generation_config,
        )
        model.limit_vocabulary(len(tokenizer))
        self.decoder = Decoder(model, stops, max_batch)

    def stream(
        self,
        prompts: Sequence[str | Sequence[int]],
        n: int = 1,
        sampling: Sampling | None = None,
        *,
        first_sequence_id: int = 0,
    ) -> Iterator[Response]:
        """Yield `n` responses per prompt, each as soon as it is finished.

        Under torchrun all ranks must iterate. Data-parallel ranks sample a block of responses together, and every rank
        yields the whole block.

        Args:
            prompts: token ids, or text, which is tokenized without a chat template: with one BOS, if the tokenizer
                adds it, and without a closing EOS.
            n: number of responses per prompt.
            sampling: temperature, truncation, length and seed; None takes the defaults.
            first_sequence_id: the id of the first response of the first prompt; ids key the sampler's noise.

        Raises:
            DataError: a prompt is empty, names an id beyond the vocabulary, or leaves no room for the response.
        """
        ids, sampling = self._ids(prompts), sampling or Sampling()
        ranks = self.decoder.model.cluster.share.ranks
        if ranks == 1:
            yield from self.decoder.stream(ids, n, sampling, first_sequence_id)
            return
        pairs = _pairs(ids, n)
        block = self.decoder.max_batch * ranks
        for start in range(0, len(pairs), block):
            yield from self._sample_and_gather(ids, n, sampling, first_sequence_id, pairs[start : start + block])

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        n: int = 1,
        sampling: Sampling | None = None,
        *,
        first_sequence_id: int = 0,
    ) -> list[Response]:
        """Return all responses, ordered by prompt and sample. Arguments and errors are those of `stream`."""
        ids = self._ids(prompts)
        return self._sample_and_gather(ids, n, sampling or Sampling(), first_sequence_id, _pairs(ids, n))

    def text(self, response: Response) -> str:
        """Return the response as text, without special tokens."""
        return self.tokenizer.decode(response.tokens, skip_special_tokens=True)

    def _sample_and_gather(
        self, prompts: list[list[int]], n: int, sampling: Sampling, first_sequence_id: int, pairs: list[Pair]
    ) -> list[Response]:
        # A rank without a sequence runs no forward pass, so it would miss the parameter all-gather of the others.
        self.decoder.model.wait_for_param_gather()
        cluster = self.decoder.model.cluster
        local_pairs = rank_slice(pairs, cluster.share)
        responses = list(self.decoder.stream(prompts, n, sampling, first_sequence_id, local_pairs))
        return all_gather_responses(cluster, responses, prompts, n, first_sequence_id)

    def _ids(self, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
        texts = iter(plain_prompt_tokens(self.tokenizer, [p for p in prompts if isinstance(p, str)]))
        return [next(texts) if isinstance(p, str) else list(p) for p in prompts]


def _pairs(prompts: Sequence[list[int]], samples: int) -> list[Pair]:
    return [(p, s) for p in range(len(prompts)) for s in range(samples)]
