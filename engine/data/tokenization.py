"""From dialogues to tokens: prompt, response, and which response tokens are the assistant's.

With a chat template the prompt is rendered with its generation prompt, exactly as it will be at sampling time, and the
whole conversation must begin with the same tokens: otherwise the model would be trained on a prompt that it never sees.
Which tokens are the assistant's is what the template's `{% generation %}` marks, where it has it; otherwise each turn
is what the rendering gains by it, compared token by token. A response ends with EOS or another stop token, and what a
template writes after the last one is cut: nothing after it is ever sampled.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from icegrt.data.conversation import Conversation, Message
from icegrt.data.tokenizer import eos_id, has_template
from icegrt.errors import DataError

Span = tuple[int, int]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class TokenizedExample:
    """Tokens of one dialogue. `action_mask` (one bool per response token) is None where every token is an action."""

    prompt: list[int]
    response: list[int]
    action_mask: list[bool] | None


def tokenize(tokenizer: Any, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    """Token ids of each text, in one call; `special` adds what the tokenizer puts around plain text (BOS)."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)
    return encoded["input_ids"]


def prompt_tokens(tokenizer: Any, conversations: Sequence[Conversation], *, chat: bool = True) -> list[list[int]]:
    """Tokens of each prompt: the template with its generation prompt, or plain text without `chat` or a template.

    Raises `DataError` for a prompt without tokens, messages without a template, and a template that refuses.
    """
    templated = chat and has_template(tokenizer)
    if templated:
        prompts = tokenize(tokenizer, [_render(tokenizer, d, _given(d), True) for d in conversations], special=False)
    else:
        prompts = _plain_prompts(tokenizer, conversations)
    for conversation, prompt in zip(conversations, prompts, strict=True):
        if not prompt:
            raise DataError(f"{conversation.where}: key `prompt`: the prompt has no tokens")
    return prompts


def tokenize_conversations(
    tokenizer: Any, conversations: Sequence[Conversation], stop_ids: Collection[int] = ()
) -> list[TokenizedExample]:
    """Tokens of each dialogue's prompt and answers, EOS included; `stop_ids` end a turn as EOS does.

    Raises `DataError` for a template that is not prefix-stable or leaves no token of an answer to train on.
    """
    eos = eos_id(tokenizer)
    stops = frozenset({eos, *stop_ids})
    prompts = prompt_tokens(tokenizer, conversations)
    if not has_template(tokenizer):
        responses = tokenize(tokenizer, [_plain_answer(d) for d in conversations], special=False)
        return [
            TokenizedExample(p, r if r and r[-1] in stops else [*r, eos], None)
            for p, r in zip(prompts, responses, strict=True)
        ]
    whole = [_render(tokenizer, d, _given(d) + d.answers, False) for d in conversations]
    rows = tokenize(tokenizer, whole, special=False)
    marked = bool(_GENERATION.search(tokenizer.get_chat_template()))
    found = []
    for conversation, prompt, tokens in zip(conversations, prompts, rows, strict=True):
        _check_prefix(tokenizer, conversation, prompt, tokens, "the prompt")
        if marked:
            spans = _marked_spans(tokenizer, conversation, len(prompt))
        elif len(conversation.answers) == 1:
            spans = [(len(prompt), len(tokens))]
        else:
            spans = _rendered_spans(tokenizer, conversation, tokens)
        _check_trained(tokenizer, conversation, tokens, spans, stops)
        found.append(_close(tokenizer, prompt, tokens, spans, eos, stops))
    return found


def _plain_answer(conversation: Conversation) -> str:
    if len(conversation.answers) > 1 or conversation.answers[0].get("content") is None:
        raise DataError(
            f"{conversation.where}: an answer of several messages, or of tool calls, needs a chat template, and none "
            "is in use: set `chat_template`, or give one answer as a string"
        )
    return conversation.answers[0]["content"]


def _given(conversation: Conversation) -> list[Message]:
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
    eos = eos_id(tokenizer)
    prompts = tokenize(tokenizer, [d.prompt for d in conversations], special=True)
    # Some tokenizers close every text with EOS, after which a model has nothing more to say.
    return [p[:-1] if p[-1:] == [eos] and not d.prompt.endswith(tokenizer.eos_token) else p
            for d, p in zip(conversations, prompts, strict=True)]  # fmt: skip


def _render(tokenizer: Any, conversation: Conversation, messages: list[Message], generate: bool) -> str:
    return _apply(tokenizer, conversation, messages, tokenize=False, add_generation_prompt=generate)


def _apply(tokenizer: Any, conversation: Conversation, messages: list[Message], **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, tools=conversation.tools, **options)
    except Exception as error:  # a template is a program of someone else's: it may raise anything
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"{conversation.where}: the chat template refuses turns of {roles}: {type(error).__name__}: {error}"
        ) from error


def _says_something(message: Message) -> bool:
    return bool((message.get("content") or "").strip() or message.get("tool_calls"))


def _check_trained(
    tokenizer: Any, conversation: Conversation, tokens: list[int], spans: list[Span], stops: frozenset[int]
) -> None:
    """An answer that says something must leave it to train on: closing tokens alone would teach nothing but to stop."""
    text = [token for start, end in spans for token in tokens[start:end] if token not in stops]
    if not tokenizer.decode(text).strip() and any(
        m["role"] == "assistant" and (m.get("content") or "").strip() for m in conversation.answers
    ):
        raise DataError(
            f"{conversation.where}: the chat template renders nothing of the answer, so no token of it would be "
            "trained on; correct `chat_template`"
        )


def _check_prefix(tokenizer: Any, conversation: Conversation, start: list[int], tokens: list[int], what: str) -> None:
    if tokens[: len(start)] == start:
        return
    pairs = zip(start, tokens, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(start), len(tokens)))
    raise DataError(
        f"{conversation.where}: the chat template is not prefix-stable: {what} alone has {len(start)} tokens, and the "
        f"whole conversation departs from them at token {at} ({tokenizer.decode(start[at : at + 8])!r} becomes "
        f"{tokenizer.decode(tokens[at : at + 8])!r}); use a template that renders earlier turns unchanged and ends its "
        "generation prompt where a token ends, mark the answers with {% generation %}, or give one answer per row"
    )


def _marked_spans(tokenizer: Any, conversation: Conversation, start: int) -> list[Span]:
    """What the template marks, from token `start` on. The marks are characters, and a token that holds one counts.

    `return_assistant_tokens_mask` is not used: it marks all that follows where a mark encloses nothing, or where no
    token begins at its last character.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template(tools=conversation.tools)
    (text,), (marks,) = render_jinja_template(
        [_given(conversation) + conversation.answers],
        conversation.tools,
        None,
        template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = []
    for first, last in marks:
        held = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if i >= start and a < last and b > first]
        if held:
            spans.append((held[0], held[-1] + 1))
    turns = sum(m["role"] == "assistant" and _says_something(m) for m in conversation.answers)
    if len(spans) < turns:
        raise DataError(
            f"{conversation.where}: the chat template's {{% generation %}} marks tokens of {len(spans)} of {turns} "
            "assistant turns; put it around the content of every one"
        )
    if not spans:  # an empty answer: its end alone is trained
        spans = [(start, start)]
    return spans


def _rendered_spans(tokenizer: Any, conversation: Conversation, tokens: list[int]) -> list[Span]:
    messages = _given(conversation) + conversation.answers
    first = len(messages) - len(conversation.answers)
    turns = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
    before = [_render(tokenizer, conversation, messages[:i], True) for i in turns]
    through = [_render(tokenizer, conversation, messages[: i + 1], False) for i in turns]
    rendered = tokenize(tokenizer, before + through, special=False)
    spans = []
    for index, start, end in zip(turns, rendered[: len(turns)], rendered[len(turns) :], strict=True):
        _check_prefix(tokenizer, conversation, start, tokens, f"what comes before turn {index}")
        _check_prefix(tokenizer, conversation, end, tokens, f"the conversation through turn {index}")
        spans.append((len(start), len(end)))
    return spans


def _close(
    tokenizer: Any, prompt: list[int], tokens: list[int], spans: list[Span], eos: int, stops: frozenset[int]
) -> TokenizedExample:
    """End each turn at its stop token, and the last one with EOS where the template writes none."""
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
        return start, end + 1  # {% generation %} often stops short of it; unlearned, no turn would ever end
    at = max((i for i in range(start, end) if tokens[i] in stops), default=-1)
    if at >= 0 and not tokenizer.decode(tokens[at + 1 : end], skip_special_tokens=True).strip():
        return start, at + 1
    return start, end
