"""From the columns of a row to a dialogue: which text is given, and which is answered.

Shapes of a row: `messages`; or `prompt` (a string, or a list of messages) with `response`. A prompt alone serves
sampling. Nothing is tokenised here; every refusal names the row and the key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from icegrt.data.rows import Row
from icegrt.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, Any]


@dataclass(frozen=True)
class Dialogue:
    """What is given and what is answered.

    `prompt` is plain text, or the messages before the first trained answer; `answers` are the messages after it, from
    the first trained assistant turn to the last (empty where only the prompt is wanted). `tools` goes to the template.
    """

    prompt: str | list[Message]
    where: str
    answers: list[Message] = field(default_factory=list)
    tools: list | None = None

    def answered(self, response: str) -> Dialogue:
        """The same prompt with one assistant turn as its answer."""
        return Dialogue(self.prompt, self.where, [{"role": "assistant", "content": response}], self.tools)


def training_dialogue(row: Row) -> Dialogue:
    """A row of supervised data: `messages` (loss on every assistant turn), else `prompt` and `response`."""
    if row.get("messages") is not None:
        messages = _messages(row, "messages")
        roles = [message["role"] for message in messages]
        if "assistant" not in roles:
            raise DataError(
                f"{row.where}: key `messages`: no assistant turn to learn from; roles are {', '.join(roles)}"
            )
        first = roles.index("assistant")
        if first == 0:
            raise DataError(f"{row.where}: key `messages`: starts with an assistant turn; expected a prompt before it")
        if roles[-1] != "assistant":
            raise DataError(
                f"{row.where}: key `messages`: ends with a turn of {roles[-1]!r}; expected the assistant's: "
                "remove what follows its last turn"
            )
        return Dialogue(messages[:first], row.where, messages[first:], _tools(row))
    if row.get("prompt") is not None and row.get("response") is not None:
        response = text_at(row, "response", row.get("response"))
        if not response.strip():
            raise DataError(f"{row.where}: key `response`: is empty; there is nothing to learn from it")
        return prompt_dialogue(row).answered(response)
    raise unknown_shape(row, "`messages`, or `prompt` and `response`")


def prompt_dialogue(row: Row) -> Dialogue:
    """A row's prompt: `prompt`, else `messages` without the assistant turn that ends it."""
    if row.get("prompt") is not None:
        prompt = row.get("prompt")
        if isinstance(prompt, str):
            text_at(row, "prompt", prompt)
            if not prompt.strip():
                raise DataError(f"{row.where}: key `prompt`: is empty")
            return Dialogue(prompt, row.where, tools=_tools(row))
        key, messages = "prompt", _messages(row, "prompt")
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
    return Dialogue(messages, row.where, tools=_tools(row))


def unknown_shape(row: Row, accepted: str) -> DataError:
    """The error for a row whose columns fit no accepted shape."""
    found = ", ".join(f"`{key}`" for key in row.columns()) or "none"
    return DataError(f"{row.where}: columns found: {found}; expected {accepted}")


def text_at(row: Row, key: str, value: Any) -> str:
    """`value` if it is text a tokenizer can read. Raises `DataError` naming `key`."""
    if not isinstance(value, str):
        raise DataError(f"{row.where}: key `{key}`: expected a string, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{row.where}: key `{key}`: half a surrogate pair ({value[error.start]!r}) at character {error.start}"
        ) from error
    return value


def _messages(row: Row, key: str) -> list[Message]:
    messages = row.get(key)
    if not isinstance(messages, list) or not messages:
        got = "an empty list" if isinstance(messages, list) else type(messages).__name__
        raise DataError(f"{row.where}: key `{key}`: expected a list of messages, got {got}")
    for index, message in enumerate(messages):
        place = f"{key}[{index}]"
        if not isinstance(message, dict):
            raise DataError(
                f"{row.where}: key `{place}`: expected an object with `role` and `content`, "
                f"got {type(message).__name__}"
            )
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise DataError(f"{row.where}: key `{place}.role`: expected one of {', '.join(ROLES)}, got {role!r}")
        if content is not None:
            text_at(row, f"{place}.content", content)
        elif not (role == "assistant" and message.get("tool_calls")):
            raise DataError(f"{row.where}: key `{place}.content`: is missing; expected a string")
    return messages


def _tools(row: Row) -> list | None:
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{row.where}: key `tools`: expected a list of JSON schemas, got {type(tools).__name__}")
    return tools or None
