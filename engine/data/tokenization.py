"""Tokenize conversations: prompt, response, and the mask of the assistant's tokens.

With a chat template the prompt is rendered with its generation prompt, exactly as for sampling. The complete
conversation must begin with the same tokens: otherwise training would use a prompt that sampling never produces.

The assistant's tokens are those that the template marks with `{% generation %}`. Without marks, a turn is the
difference between the renderings before and after it, compared token by token. A response ends with EOS or another stop
token. Template text after the last stop token is truncated, as sampling never produces it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from icegrt.data.conversation import Conversation, Message, has_content
from icegrt.data.tokenizer import eos_id, has_template
from icegrt.errors import DataError

Span = tuple[int, int]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class TokenizedExample:
    """Tokens of one conversation.

    `action_mask` has one bool per response token, True for the assistant's; None if all are the assistant's.
    """

    prompt: list[int]
    response: list[int]
    action_mask: list[bool] | None


def tokenize(tokenizer: Any, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    """Return the token ids of each text; `special` adds the tokenizer's special tokens (BOS)."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)
    return encoded["input_ids"]


def prompt_tokens(tokenizer: Any, conversations: Sequence[Conversation], *, chat: bool = True) -> list[list[int]]:
    """Return the tokens of each prompt: templated, with generation prompt; plain text without `chat` or a template.

    Raises:
        DataError: a prompt has no tokens, is a list of messages without a template, or the template raises.
    """
    if chat and has_template(tokenizer):
        texts = [_render(tokenizer, c, _prompt_messages(c), generate=True) for c in conversations]
        prompts = tokenize(tokenizer, texts, special=False)
    else:
        prompts = _plain_prompts(tokenizer, conversations)
    for conversation, prompt in zip(conversations, prompts, strict=True):
        if not prompt:
            raise DataError(f"{conversation.where}: key `prompt`: the prompt has no tokens")
    return prompts


def tokenize_conversations(
    tokenizer: Any, conversations: Sequence[Conversation], stop_ids: Collection[int] = ()
) -> list[TokenizedExample]:
    """Return the tokens of each conversation's prompt and answers, EOS included; `stop_ids` end a turn as EOS does.

    Raises:
        DataError: a template is not prefix-stable, or leaves no token of an answer to train on.
    """
    eos = eos_id(tokenizer)
    stops = frozenset({eos, *stop_ids})
    prompts = prompt_tokens(tokenizer, conversations)
    if not has_template(tokenizer):
        responses = tokenize(tokenizer, [_plain_answer(c) for c in conversations], special=False)
        return [
            TokenizedExample(p, r if r and r[-1] in stops else [*r, eos], None)
            for p, r in zip(prompts, responses, strict=True)
        ]
    texts = [_render(tokenizer, c, _prompt_messages(c) + c.answers, generate=False) for c in conversations]
    token_lists = tokenize(tokenizer, texts, special=False)
    has_marks = bool(_GENERATION.search(tokenizer.get_chat_template()))
    examples = []
    for conversation, prompt, tokens in zip(conversations, prompts, token_lists, strict=True):
        _check_prefix(tokenizer, conversation, prompt, tokens, "the prompt")
        if has_marks:
            spans = _marked_spans(tokenizer, conversation, len(prompt))
        elif len(conversation.answers) == 1:
            spans = [(len(prompt), len(tokens))]
        else:
            spans = _rendered_spans(tokenizer, conversation, tokens)
        _check_trained(tokenizer, conversation, tokens, spans, stops)
        examples.append(_close(tokenizer, prompt, tokens, spans, eos, stops))
    return examples


def _plain_answer(conversation: Conversation) -> str:
    if len(conversation.answers) > 1 or conversation.answers[0].get("content") is None:
        raise DataError(
            f"{conversation.where}: an answer of several messages, or of tool calls, needs a chat template, and none "
            "is in use: set `chat_template`, or give one answer as a string"
        )
    return conversation.answers[0]["content"]


def _prompt_messages(conversation: Conversation) -> list[Message]:
    if isinstance(conversation.prompt, str):
        return [{"role": "user", "content": conversation.prompt}]
    return conversation.prompt


def _plain_prompts(tokenizer: Any, conversations: Sequence[Conversation]) -> list[list[int]]:
    for conversation in conversations:
        if not isinstance(conversation.prompt, str):
            raise DataError(
                f"{conversation.where}: key `messages` (or a `prompt` of messages) needs a chat template, and none is "
                "in use: set `chat_template`, or give `prompt` as a string"
            )
    return plain_prompt_tokens(tokenizer, [c.prompt for c in conversations])


def plain_prompt_tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each prompt of plain text, with the BOS that the tokenizer adds and without a closing EOS.

    A text that begins with BOS gets no second one, and a text that ends with EOS keeps its own.
    """
    bos, eos = getattr(tokenizer, "bos_token_id", None), tokenizer.eos_token_id
    prompts = []
    for text, tokens in zip(texts, tokenize(tokenizer, texts, special=True), strict=True):
        if bos is not None and tokens[:2] == [bos, bos]:
            tokens = tokens[1:]
        # Some tokenizers append EOS to every text. A prompt that ends with EOS would end the answer.
        own_eos = [eos] if eos is not None and text.endswith(tokenizer.eos_token) else []
        if eos is not None and tokens[-len(own_eos) - 1 :] == [*own_eos, eos]:
            tokens = tokens[:-1]
        prompts.append(tokens)
    return prompts


def _render(tokenizer: Any, conversation: Conversation, messages: list[Message], generate: bool) -> str:
    return _apply(tokenizer, conversation, messages, tokenize=False, add_generation_prompt=generate)


def _apply(tokenizer: Any, conversation: Conversation, messages: list[Message], **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, tools=conversation.tools, **options)
    except Exception as error:  # a template is a program of the checkpoint's author and may raise any type
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"{conversation.where}: the chat template refuses turns of {roles}: {type(error).__name__}: {error}"
        ) from error


def _check_trained(
    tokenizer: Any, conversation: Conversation, tokens: list[int], spans: list[Span], stops: frozenset[int]
) -> None:
    """Check that an answer with text has a trained token besides stop tokens, which alone would only teach to stop."""
    text = [token for start, end in spans for token in tokens[start:end] if token not in stops]
    if not tokenizer.decode(text).strip() and any(
        m["role"] == "assistant" and (m.get("content") or "").strip() for m in conversation.answers
    ):
        raise DataError(
            f"{conversation.where}: the chat template renders nothing of the answer, so no token of it would be "
            "trained on; correct `chat_template`"
        )


def _check_prefix(tokenizer: Any, conversation: Conversation, start: list[int], tokens: list[int], part: str) -> None:
    if tokens[: len(start)] == start:
        return
    pairs = zip(start, tokens, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(start), len(tokens)))
    raise DataError(
        f"{conversation.where}: the chat template is not prefix-stable: {part} alone has {len(start)} tokens, and the "
        f"whole conversation departs from them at token {first} ({tokenizer.decode(start[first : first + 8])!r} "
        f"becomes {tokenizer.decode(tokens[first : first + 8])!r}); use a template that renders earlier turns "
        "unchanged and ends its generation prompt where a token ends, mark the answers with {% generation %}, or give "
        "one answer per row"
    )


def _marked_spans(tokenizer: Any, conversation: Conversation, start: int) -> list[Span]:
    """Return the token spans that the template marks, from token `start` on.

    A mark is a range of characters; every token that overlaps it belongs to the span.
    """
    # transformers 5.24: `return_assistant_tokens_mask` of apply_chat_template marks all following tokens if a mark is
    # empty or no token begins at its last character. We map the characters to tokens ourselves.
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template(tools=conversation.tools)
    (text,), (marks,) = render_jinja_template(
        [_prompt_messages(conversation) + conversation.answers],
        conversation.tools,
        None,
        template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = []
    for first, last in marks:
        marked = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if i >= start and a < last and b > first]
        if marked:
            spans.append((marked[0], marked[-1] + 1))
    turns = sum(m["role"] == "assistant" and has_content(m) for m in conversation.answers)
    if len(spans) < turns:
        raise DataError(
            f"{conversation.where}: the chat template's {{% generation %}} marks tokens of {len(spans)} of {turns} "
            "assistant turns; put it around the content of every one"
        )
    if not spans:  # an empty answer: only its stop token is trained
        spans = [(start, start)]
    return spans


def _rendered_spans(tokenizer: Any, conversation: Conversation, tokens: list[int]) -> list[Span]:
    """Return each assistant turn's token span: from the rendering before it to the rendering that ends with it."""
    messages = _prompt_messages(conversation) + conversation.answers
    first = len(messages) - len(conversation.answers)
    turns = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
    before = [_render(tokenizer, conversation, messages[:i], generate=True) for i in turns]
    through = [_render(tokenizer, conversation, messages[: i + 1], generate=False) for i in turns]
    token_lists = tokenize(tokenizer, before + through, special=False)
    spans = []
    for index, start, end in zip(turns, token_lists[: len(turns)], token_lists[len(turns) :], strict=True):
        _check_prefix(tokenizer, conversation, start, tokens, f"the text before turn {index}")
        _check_prefix(tokenizer, conversation, end, tokens, f"the conversation through turn {index}")
        spans.append((len(start), len(end)))
    return spans


def _close(
    tokenizer: Any, prompt: list[int], tokens: list[int], spans: list[Span], eos: int, stops: frozenset[int]
) -> TokenizedExample:
    """End each turn at its stop token; append EOS to the last turn if it has none."""
    closed = [_to_stop(tokenizer, tokens, span, stops) for span in spans]
    end = closed[-1][1]
    tokens = tokens[:end]
    if tokens[-1] not in stops:
        tokens.append(eos)
        closed[-1] = (closed[-1][0], end + 1)
    mask = [False] * len(tokens)
    for start, stop in closed:
        mask[start:stop] = [True] * (stop - start)
    mask = mask[len(prompt) :]
    return TokenizedExample(prompt, tokens[len(prompt) :], None if all(mask) else mask)


def _to_stop(tokenizer: Any, tokens: list[int], span: Span, stops: frozenset[int]) -> Span:
    start, end = span
    if end < len(tokens) and tokens[end] in stops and (end == start or tokens[end - 1] not in stops):
        return start, end + 1  # {% generation %} often excludes the stop token, which the model must learn to sample
    last_stop = max((i for i in range(start, end) if tokens[i] in stops), default=-1)
    if last_stop >= 0 and not tokenizer.decode(tokens[last_stop + 1 : end], skip_special_tokens=True).strip():
        return start, last_stop + 1
    return start, end
