"""Adapt reward functions written for TRL, verl and OpenRLHF; the names of their parameters identify the library.

* TRL: `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, sync or async; conversations if the
  data's prompts are conversations. https://huggingface.co/docs/trl/main/en/grpo_trainer#using-a-custom-reward-function
* verl: `compute_score(data_source, solution_str, ground_truth, extra_info=None) -> float | dict` for one response, or
  the plural names for a batch. https://verl.readthedocs.io/en/latest/preparation/reward_function.html
* OpenRLHF: `reward_func(queries, prompts, labels, **kwargs) -> tensor | dict(rewards, scores, extra_logs)`.
  https://github.com/OpenRLHF/OpenRLHF/blob/main/examples/python/reward_func.py
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from icegrt.errors import ConfigError, RewardError
from icegrt.rewards.function import RewardFunction, is_finite_number, name_of
from icegrt.rewards.sample import RewardResult, Sample

_VERL, _VERL_BATCH = "solution_str", "solution_strs"
_TRL = {"completions", "completion_ids", "completions_ids"}
_LABEL_COLUMNS = ("label", "labels", "answer", "ground_truth")


def adapt(
    function: Callable[..., Any], style: str = "auto", label_key: str = "", key: str = "reward"
) -> RewardFunction:
    """Return `function` as `reward(samples)`.

    Args:
        function: a function of this project's form or of a library's.
        style: "icegrt", "trl", "verl", "openrlhf", or "auto" (see `style_of`).
        label_key: the column of the label, for verl and OpenRLHF.
        key: the configuration key, for messages.

    Raises:
        ConfigError: the signature fits none of the four.
    """
    style = style_of(function, key) if style == "auto" else style
    if style == "icegrt":
        return function
    adapter = {"trl": _from_trl, "verl": _from_verl, "openrlhf": _from_openrlhf}[style]
    adapted = adapter(function, label_key)
    adapted.__name__ = name_of(function)
    adapted.__wrapped__ = function  # errors name the file and line of the user's function
    return adapted


def style_of(function: Callable[..., Any], key: str = "reward") -> str:
    """Return the library whose form `function` has, by the names of its parameters.

    Raises:
        ConfigError: the signature fits none.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a function written in C may have no signature
        return "icegrt"
    names = set(parameters)
    if {"queries", "prompts"} <= names:
        return "openrlhf"
    if names & {_VERL, _VERL_BATCH}:
        return "verl"
    if names & _TRL:
        return "trl"
    required = [
        p for p in parameters.values() if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    takes_one = any(p.kind != p.KEYWORD_ONLY and p.kind != p.VAR_KEYWORD for p in parameters.values())
    if len(required) > 1 or not takes_one or any(p.kind == p.KEYWORD_ONLY for p in required):
        form = f"`{name_of(function)}({', '.join(parameters)})`{_location(function)}"
        raise ConfigError(
            f"{key}: {form} is no reward function that is known: "
            "expected reward(samples), or the parameters of TRL (completions), verl (solution_str, ground_truth) or "
            "OpenRLHF (queries, prompts, labels); set ppo.reward.sources[].style"
        )
    return "icegrt"


def _location(function: Callable[..., Any]) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f" in {Path(code.co_filename).name}:{code.co_firstlineno}" if code is not None else ""


def _from_trl(function: Callable[..., Any], label_key: str) -> RewardFunction:
    def reward(samples: list[Sample]) -> Any:
        # Rows differ: the batch has every column of the data, and conversations if any prompt of the data is one.
        chat = any(s.is_chat or not isinstance(s.row.get("prompt"), str) for s in samples)
        ids = [list(s.tokens) for s in samples]
        names = dict.fromkeys(name for s in samples for name in (*s.columns, *s.row))
        columns = {name: [s.row.get(name) for s in samples] for name in names}
        for name in ("prompt", "completion", "completion_ids", "messages"):
            columns.pop(name, None)
        arguments = columns | {
            "prompts": [s.prompt_messages if chat else s.row["prompt"] for s in samples],
            "completions": [[{"role": "assistant", "content": s.text}] if chat else s.text for s in samples],
            "completion_ids": ids,
        }
        if "completions_ids" in inspect.signature(function).parameters:  # the spelling of TRL's documentation
            arguments["completions_ids"] = ids
        return _converted(function(**_accepted(function, arguments)), _trl_results)

    return reward


def _trl_results(returned: Any) -> list[Any]:
    # In TRL a function returns None for a response of another task: it does not judge it.
    return [RewardResult(None) if score is None else score for score in returned]


def _from_verl(function: Callable[..., Any], label_key: str) -> RewardFunction:
    batched = _VERL_BATCH in inspect.signature(function).parameters

    def arguments_of(sample: Sample) -> dict[str, Any]:
        return {
            "data_source": sample.row.get("data_source"),
            "solution_str": sample.text,
            "ground_truth": _ground_truth(sample, label_key),
            "extra_info": _extra_info(sample.row.get("extra_info")),
        }

    def reward(samples: list[Sample]) -> Any:
        rows = [arguments_of(sample) for sample in samples]
        if batched:
            columns = {("extra_infos" if n == "extra_info" else f"{n}s"): [row[n] for row in rows] for n in rows[0]}
            return _converted(function(**_accepted(function, columns)), _verl_results)
        returned = [function(**_accepted(function, row)) for row in rows]
        if any(inspect.isawaitable(value) for value in returned):
            return _converted(_gathered(returned), _verl_results)
        return _verl_results(returned)

    return reward


def _extra_info(value: Any) -> Any:
    # verl passes a dict even if the data lack the column, and adds two keys about the conversation's turns.
    defaults = {"num_turns": None, "rollout_reward_scores": {}}
    return defaults | dict(value or {}) if value is None or isinstance(value, Mapping) else value


def _ground_truth(sample: Sample, label_key: str) -> Any:
    if label_key:
        return _column(sample, label_key)
    nested = sample.row.get("reward_model")
    # A null says that the column is absent: `datasets` and Parquet give every row the columns of all rows.
    if isinstance(nested, Mapping) and nested.get("ground_truth") is not None:
        return nested["ground_truth"]
    if sample.row.get("ground_truth") is not None:
        return sample.row["ground_truth"]
    raise RewardError(
        f"{sample.where}: a function of verl's form needs the column reward_model.ground_truth (or ground_truth); "
        f"found {', '.join(sample.row)}; name another one by ppo.reward.sources[].label_key"
    )


def _verl_results(returned: Any) -> list[Any]:
    return [_verl_result(value) for value in returned]


def _verl_result(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if "score" not in value:
        return None  # the caller refuses it and names the row
    metrics = {k: v for k, v in value.items() if k != "score" and is_finite_number(v, boolean=True)}
    return RewardResult(value["score"] if value["score"] is not None else float("nan"), metrics)


def _from_openrlhf(function: Callable[..., Any], label_key: str) -> RewardFunction:
    def reward(samples: list[Sample]) -> Any:
        arguments = {
            "queries": [s.prompt + s.text for s in samples],
            "prompts": [s.prompt for s in samples],
            "labels": [_label(s, label_key) for s in samples],
        }
        returned = function(**_accepted(function, arguments))
        return _converted(returned, lambda value: _openrlhf_results(value, len(samples)))

    return reward


def _label(sample: Sample, label_key: str) -> Any:
    if label_key:
        return _column(sample, label_key)
    return next((sample.row[name] for name in _LABEL_COLUMNS if sample.row.get(name) is not None), "")


def _openrlhf_results(returned: Any, count: int) -> Any:
    if not isinstance(returned, Mapping):
        return _as_list(returned)
    scores, logs = _as_list(returned.get("rewards")), returned.get("extra_logs") or {}
    if not isinstance(scores, Sequence) or len(scores) != count:
        return scores  # the caller refuses it
    columns = {}
    for name, value in logs.items():
        value = _as_list(value)
        columns[name] = value if isinstance(value, list) and len(value) == count else [value] * count
    rows = ({n: c[i] for n, c in columns.items() if is_finite_number(c[i], boolean=True)} for i in range(count))
    return [RewardResult(float("nan") if s is None else s, m) for s, m in zip(scores, rows, strict=True)]


def _as_list(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _column(sample: Sample, name: str) -> Any:
    if name not in sample.row:
        raise RewardError(
            f"{sample.where}: no column `{name}`, which ppo.reward.sources[].label_key names; found "
            f"{', '.join(sample.row)}"
        )
    return sample.row[name]


def _accepted(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that `function` has parameters for."""
    parameters = inspect.signature(function).parameters
    if any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


def _converted(returned: Any, convert: Callable[[Any], Any]) -> Any:
    """Return `convert(returned)`, or an awaitable of it. A text or number is returned for the caller to refuse."""
    if inspect.isawaitable(returned):

        async def finish() -> Any:
            return _converted(await returned, convert)

        return finish()
    return returned if returned is None or isinstance(returned, (str, bytes, float, int)) else convert(returned)


async def _gathered(values: list[Any]) -> list[Any]:
    async def resolve(value: Any) -> Any:
        return await value if inspect.isawaitable(value) else value

    return await asyncio.gather(*(resolve(value) for value in values))
