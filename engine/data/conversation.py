"""Read a row's columns as a conversation: the prompt, and the answer to it.

Accepted rows: `messages`; or a prompt (a string, or a list of messages) with a response. Column names of TRL, verl and
OpenRLHF are recognised too. Sampling needs the prompt alone. This module does not tokenize; every error names the row
and the key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from icegrt.data.rows import PROMPTS, RESPONSES, Row
from icegrt.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """A prompt and the messages that answer it.

    `prompt` is plain text, or the messages before the first trained assistant turn. `answers` holds the messages from
    that turn to the last assistant turn; it is empty if only the prompt is used. `tools` is passed to the template.
    """

    prompt: str | list[Message]
    where: str
    answers: list[Message] = field(default_factory=list)
    tools: list | None = None

    def with_answer(self, response: str | list[Message]) -> Conversation:
        """Return this prompt with `response`: the text of one assistant turn, or messages that begin with one."""
        answers = [{"role": "assistant", "content": response}] if isinstance(response, str) else response
        return Conversation(self.prompt, self.where, answers, self.tools)


def training_conversation(row: Row) -> Conversation:
    """Read a row of supervised data: `messages` (loss on every assistant turn), else a prompt and a response."""
    answer = column(row, RESPONSES)
    if row.get("messages") is not None:
        if answer is not None:
            raise DataError(
                f"{row.where}: has both `messages` and `{answer}`: keep the one to learn from, or name the "
                "prompt's column with input_key"
            )
        messages = _messages(row, "messages")
        _check_agreement(row, messages)
        return _split(row, "messages", messages)
    if prompt_column(row) is not None and answer is not None:
        conversation, response = prompt_conversation(row), row.get(answer)
        if isinstance(response, list) and any(isinstance(message, dict) for message in response):
            turns = _answer_turns(row, answer, _messages(row, answer))
            return conversation.with_answer(turns)
        if not checked_text(row, answer, response).strip():
            raise DataError(f"{row.where}: key `{answer}`: is empty; there is nothing to learn from it")
        return conversation.with_answer(response)
    raise unknown_shape(row, "`messages`, or `prompt` and `response`")


def prompt_conversation(row: Row) -> Conversation:
    """Read a row's prompt: its prompt column, else `messages` without a final assistant turn."""
    key = prompt_column(row)
    if key is not None:
        prompt = row.get(key)
        if isinstance(prompt, str):
            checked_text(row, key, prompt)
            if not prompt.strip():
                raise DataError(f"{row.where}: key `{key}`: is empty")
            messages = None
        else:
            messages = _messages(row, key)
        if row.get("messages") is not None:
            _check_agreement(row, _messages(row, "messages"))
        if messages is None:
            return Conversation(prompt, row.where, tools=_tools(row))
    elif row.get("messages") is not None:
        key, messages = "messages", _messages(row, "messages")
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
    else:
        raise unknown_shape(row, "`prompt` (a string or a list of messages), or `messages`")
    if not messages:
        raise DataError(f"{row.where}: key `{key}`: holds only an assistant turn, which leaves no prompt")
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{row.where}: key `{key}`: the prompt ends with an assistant turn; there is nothing to answer")
    if all(message["role"] == "system" for message in messages):
        raise DataError(f"{row.where}: key `{key}`: holds only a system turn; there is nothing to answer")
    return Conversation(messages, row.where, tools=_tools(row))


def preference_conversations(row: Row) -> tuple[Conversation, Conversation]:
    """Read a row's `chosen` and `rejected`, each as the shared prompt with its answer.

    Both are strings beside a prompt column, or both are lists of messages. Lists either begin with the prompt, which
    a prompt column must then match, or with the answer to the prompt column.
    """
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, list) != isinstance(rejected, list):
        key, other = ("chosen", "rejected") if isinstance(chosen, list) else ("rejected", "chosen")
        raise DataError(f"{row.where}: key `{key}`: expected a string, got list, as `{other}` is no list of messages")
    if chosen == rejected:
        raise DataError(
            f"{row.where}: `chosen` and `rejected` are the same, so there is nothing to prefer; remove the row"
        )
    if not isinstance(chosen, list):
        texts = [checked_text(row, key, row.get(key)) for key in ("chosen", "rejected")]
        prompt = prompt_conversation(row)
        return prompt.with_answer(texts[0]), prompt.with_answer(texts[1])
    turns = {key: _messages(row, key) for key in ("chosen", "rejected")}
    if turns["chosen"][0]["role"] == "assistant" and prompt_column(row) is not None:
        prompt, n_shared = prompt_conversation(row), 0
    else:
        pairs = zip(turns["chosen"], turns["rejected"], strict=False)
        n_shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(map(len, turns.values())))
        prompt_messages = turns["chosen"][:n_shared]
        if not prompt_messages:
            raise DataError(
                f"{row.where}: `chosen` and `rejected` share no first message, and there is no prompt column; expected "
                "the same prompt in both"
            )
        if prompt_column(row) is not None:
            _check_agreement(row, prompt_messages)
        prompt = Conversation(prompt_messages, row.where, tools=_tools(row))
    answers = [_answer_turns(row, key, messages[n_shared:]) for key, messages in turns.items()]
    return prompt.with_answer(answers[0]), prompt.with_answer(answers[1])


def column(row: Row, names: tuple[str, ...]) -> str | None:
    """Return which of `names` the row has: the first, else the only other; None if it has none.

    Raises:
        DataError: the first is absent and several others are present.
    """
    if row.get(names[0]) is not None:
        return names[0]
    aliases = [name for name in names[1:] if row.get(name) is not None]
    if len(aliases) > 1:
        raise DataError(
            f"{row.where}: columns {_shortened_list(aliases)} could each be the `{names[0]}`: keep one of them"
        )
    return aliases[0] if aliases else None


def prompt_column(row: Row) -> str | None:
    """Return the column that holds the prompt, or None.

    Raises:
        DataError: several columns could hold it.
    """
    key = column(row, PROMPTS)
    if key == "input" and row.get("instruction") is not None:
        raise DataError(
            f"{row.where}: columns `instruction` and `input`: join them into one `prompt`, or name the one to use with "
            "input_key"
        )
    return key


def unknown_shape(row: Row, accepted: str) -> DataError:
    """Return the error for a row whose columns fit no accepted shape."""
    columns = _shortened_list(row.columns()) or "none"
    return DataError(
        f"{row.where}: columns found: {columns}; expected {accepted}; a prompt of another name is named with input_key"
    )


def checked_text(row: Row, key: str, value: Any) -> str:
    """Return `value`.

    Raises:
        DataError: it is no string, or holds half a surrogate pair, which tokenizers refuse.
    """
    if not isinstance(value, str):
        raise DataError(f"{row.where}: key `{key}`: expected a string, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{row.where}: key `{key}`: half a surrogate pair ({value[error.start]!r}) at character {error.start}"
        ) from error
    return value


def _split(row: Row, key: str, messages: list[Message]) -> Conversation:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise DataError(f"{row.where}: key `{key}`: no assistant turn to learn from; roles are {', '.join(roles)}")
    first = roles.index("assistant")
    if first == 0:
        raise DataError(f"{row.where}: key `{key}`: starts with an assistant turn; expected a prompt before it")
    return Conversation(messages[:first], row.where, _answer_turns(row, key, messages[first:]), _tools(row))


def _answer_turns(row: Row, key: str, turns: list[Message]) -> list[Message]:
    if not turns or turns[0]["role"] != "assistant":
        got = f"a turn of {turns[0]['role']!r}" if turns else "nothing"
        raise DataError(f"{row.where}: key `{key}`: expected the assistant's turn after the prompt, got {got}")
    if turns[-1]["role"] != "assistant":
        raise DataError(
            f"{row.where}: key `{key}`: ends with a turn of {turns[-1]['role']!r}; expected the assistant's: "
            "remove what follows its last turn"
        )
    if not any(m["role"] == "assistant" and has_content(m) for m in turns):
        raise DataError(f"{row.where}: key `{key}`: every assistant turn is empty; there is nothing to learn from it")
    return turns


def has_content(message: Message) -> bool:
    """Return whether a message has text or tool calls."""
    return bool((message.get("content") or "").strip() or message.get("tool_calls"))


def _check_agreement(row: Row, messages: list[Message]) -> None:
    """Check that a prompt column repeats how `messages` begin, as it does in many data sets."""
    key = prompt_column(row)
    if key is None:
        return
    prompt = row.get(key)
    if isinstance(prompt, str):
        first = next((m.get("content") for m in messages if m["role"] == "user"), None)
        agrees = first is not None and first.strip() == prompt.strip()
    else:
        turns = _messages(row, key)
        agrees = messages[: len(turns)] == turns
    if not agrees:
        raise DataError(
            f"{row.where}: `{key}` is not how the row's messages begin: keep the one to use, or name it with input_key"
        )


def _messages(row: Row, key: str) -> list[Message]:
    messages = row.get(key)
    if not isinstance(messages, list) or not messages:
        got = "an empty list" if isinstance(messages, list) else type(messages).__name__
        raise DataError(f"{row.where}: key `{key}`: expected a list of messages, got {got}")
    return [_message(row, f"{key}[{index}]", message) for index, message in enumerate(messages)]


def _message(row: Row, key: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise DataError(
            f"{row.where}: key `{key}`: expected an object with `role` and `content`, got {type(message).__name__}"
        )
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"{row.where}: key `{key}.role`: expected one of {', '.join(ROLES)}, got {role!r}")
    if content is not None:
        checked_text(row, f"{key}.content", content)
    elif not (role == "assistant" and message.get("tool_calls")):
        raise DataError(f"{row.where}: key `{key}.content`: is missing; expected a string")
    # Arrow gives every message the fields of all messages. Templates treat a null `tool_calls` as present: remove it.
    return _without_nulls(message, keep=("content",))


def _without_nulls(value: Any, keep: tuple[str, ...] = ()) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None or k in keep}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _tools(row: Row) -> list | None:
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{row.where}: key `tools`: expected a list of JSON schemas, got {type(tools).__name__}")
    return _without_nulls(tools) or None


def _shortened_list(names: list[str]) -> str:
    """Return the first 12 names as text, and the number of the others."""
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(f"`{name}`" for name in names[:12]) + more
