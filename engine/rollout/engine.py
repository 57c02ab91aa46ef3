"""The rollout engine as a library: prompts in, responses out, with a model's weights in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist

from icegrt.data import stop_ids
from icegrt.data.tokenization import plain_prompt_tokens
from icegrt.data.tokenizer import check_vocabulary
from icegrt.data.types import Tokenizer
from icegrt.errors import RunError
from icegrt.model.pipeline_model import PipelineModel
from icegrt.rollout.decoder import Decoder
from icegrt.rollout.gather import all_gather_responses
from icegrt.rollout.requests import Request
from icegrt.rollout.settings import RolloutSettings
from icegrt.rollout.types import Response, Sampling
from icegrt.utils.console import progress


class RolloutEngine:
    """Generates responses with a model and its tokenizer.

    A response ends with the tokenizer's EOS, an EOS of the model's configuration or generation configuration, or one of
    `stop_token_ids`. Ids beyond the tokenizer, which pad the vocabulary of many models, are never sampled: the engine
    limits the vocabulary of `model` to the tokenizer.

    The model's weights are read in place. After a change of them by other means than a role's optimizer step or a
    checkpoint, call `model.mark_weights_changed()`: cached keys and values are then computed again.

    Args:
        model: a model of `icegrt.load_actor`, or of a role.
        tokenizer: its `transformers` tokenizer.
        max_batch: number of sequences that a rank decodes together; that of `settings` if they are given.
        stop_token_ids: more token ids that end a response.
        settings: sizes and policies of the KV cache and its scheduler; None takes the defaults.

    Raises:
        ConfigError: the tokenizer has more tokens than the model, or a size is out of bounds.
        DataError: there is no stop token.
    """

    def __init__(
        self,
        model: PipelineModel,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 256,
        stop_token_ids: Sequence[int] = (),
        settings: RolloutSettings | None = None,
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
        # Not a bound method: a cycle would keep the model, and with it the process groups, until a collection of
        # garbage, which ranks do not make at the same time.
        self._to_text = partial(tokenizer.decode, skip_special_tokens=True)
        self.decoder = Decoder(model, stops, settings or RolloutSettings(max_batch=max_batch), self._to_text)

    # -- batches ---------------------------------------------------------------------------------------------------

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
        block = max(1, self.decoder.settings.max_batch * ranks // n)
        for start in range(0, len(ids), block):
            for response in self._sample_and_gather(
                ids[start : start + block], n, sampling, first_sequence_id + start * n
            ):
                yield dataclasses.replace(response, prompt_index=start + response.prompt_index)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        n: int = 1,
        sampling: Sampling | None = None,
        *,
        first_sequence_id: int = 0,
    ) -> list[Response]:
        """Return all responses, ordered by prompt and sample. Arguments and errors are those of `stream`."""
        return self._sample_and_gather(self._ids(prompts), n, sampling or Sampling(), first_sequence_id)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        n: int = 1,
        sampling: Sampling | None = None,
        *,
        first_sequence_id: int = 0,
        **template: Any,
    ) -> list[Response]:
        """Return `n` answers to a conversation. Turns that were computed before are found in the cache.

        Args:
            messages: turns with `role` and `content`, oldest first, in the form of the tokenizer's chat template.
            n: number of answers.
            sampling: None takes the defaults.
            first_sequence_id: the id of the first answer.
            template: further arguments of `apply_chat_template`, such as `tools`.

        Raises:
            RunError: the tokenizer has no chat template.
            DataError: the conversation leaves no room for the answer.
        """
        tokenizer: Any = self.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise RunError("chat: the tokenizer has no chat template; set tokenizer.chat_template, or use generate")
        encoded = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=True, **template
        )
        return self.generate([list(encoded["input_ids"])], n, sampling, first_sequence_id=first_sequence_id)

    # -- single requests -------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: str | Sequence[int],
        n: int = 1,
        sampling: Sampling | None = None,
        *,
        first_sequence_id: int = 0,
    ) -> Request:
        """Add a prompt beside those that run. `step` or `wait` computes it.

        Requests are served by this rank's model: with tensor or pipeline parallelism all ranks of the model make the
        same calls; data-parallel ranks are independent.

        Args:
            prompt: token ids, or text as in `stream`.
            n: number of responses.
            sampling: of this request alone; None takes the defaults.
            first_sequence_id: the id of its first response.

        Returns:
            The request; its `responses` are filled as they finish.

        Raises:
            DataError: the prompt is empty, leaves no room for the response, or does not fit the cache.
        """
        requests = self.decoder.submit(self._ids([prompt]), n, sampling or Sampling(), first_sequence_id)
        return requests[0]

    def step(self) -> list[Response]:
        """Advance all requests by one step. Returns the responses that are finished."""
        return [response for _, response in self.decoder.step()]

    def wait(self, request: Request) -> list[Response]:
        """Advance all requests until this one is finished, and return its responses in the order of its samples.

        Raises:
            RunError: a step has failed since the request was submitted, and the request was lost with it.
        """
        while not request.is_finished:
            if not self.decoder.n_unfinished:
                raise RunError("the request was lost when a step failed; submit it again")
            self.decoder.step()
        return sorted(request.responses, key=lambda r: r.sample)

    def abort(self, request: Request) -> list[Response]:
        """Stop a request. Returns its unfinished responses so far, with finish reason 'abort'."""
        return self.decoder.abort([request])

    def resume(self, request: Request) -> None:
        """Let an aborted request continue from its last tokens. If the weights have changed, newer ones sample on."""
        self.decoder.resume([request])

    # -- memory and text -------------------------------------------------------------------------------------------

    @property
    def cache_summary(self) -> str:
        """The size of the KV cache that was allocated last, as a line of text; empty before the first request."""
        return self.decoder.cache_summary

    def release(self) -> None:
        """Free the KV cache, activations and CUDA graphs. The next request allocates them again."""
        self.decoder.release()

    def text(self, response: Response) -> str:
        """Return the response as text, without special tokens."""
        return self._to_text(response.tokens)

    def _sample_and_gather(
        self, prompts: list[list[int]], n: int, sampling: Sampling, first_sequence_id: int
    ) -> list[Response]:
        """Return the responses of all ranks. Data-parallel ranks take prompts from one queue."""
        cluster = self.decoder.model.cluster
        # A rank without a sequence runs no forward pass, so it would miss the parameter all-gather of the others.
        self.decoder.model.wait_for_param_gather()
        take: Callable[[int], Sequence[int]] | None = None
        concurrency = None
        queue = None
        ranks = cluster.share.ranks
        if ranks > 1:
            assert cluster.control is not None
            is_leader = dist.get_rank(cluster.model_group) == 0
            queue = cluster.control.open_queue(len(prompts), cluster.share.rank, is_leader)
            take = queue.take
            # A rank that begins early leaves the others their share.
            concurrency = min(self.decoder.settings.max_batch, -(-len(prompts) * n // ranks))
        responses = []
        with progress(None, "rollout", "tokens") as bar:
            for response in self.decoder.stream(prompts, n, sampling, first_sequence_id, take, concurrency):
                responses.append(response)
                bar.advance(len(response.tokens))
        if queue is not None:
            queue.close()
        return all_gather_responses(
            cluster, responses, prompts, n, first_sequence_id, self.decoder.model.weights_version
        )

    def _ids(self, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
        texts = iter(plain_prompt_tokens(self.tokenizer, [p for p in prompts if isinstance(p, str)]))
        return [next(texts) if isinstance(p, str) else list(p) for p in prompts]
