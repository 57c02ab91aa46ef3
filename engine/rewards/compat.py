"""Reward functions written for TRL, verl and OpenRLHF run unchanged: recognised by the names of their parameters.

* TRL: `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, sync or async; conversations where
  the data's prompts are conversations. https://huggingface.co/docs/trl/main/en/grpo_trainer#using-a-custom-reward-function
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

STYLES = ("icegrt", "trl", "verl", "openrlhf")
_VERL, _VERL_BATCH = "solution_str", "solution_strs"
_TRL = {"completions", "completion_ids", "completions_ids"}
# Where data written for a library keeps what it calls the label or ground truth.
_LABELS = ("label", "labels", "answer", "ground_truth")


def adapt(
    function: Callable[..., Any], style: str = "auto", label_key: str = "", key: str = "reward"
) -> RewardFunction:
    """`function` as `reward(samples)`. Raises `ConfigError` naming `key` for a signature that is none of the four."""
    style = style_of(function, key) if style == "auto" else style
    if style == "icegrt":
        return function
    make = {"trl": _from_trl, "verl": _from_verl, "openrlhf": _from_openrlhf}[style]
    adapted = make(function, label_key)
    adapted.__name__ = name_of(function)
    adapted.__wrapped__ = function  # errors name the user's own file and line
    return adapted


def style_of(function: Callable[..., Any], key: str = "reward") -> str:
    """Whose function this is, by the names of its parameters."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C: it says nothing of itself
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
        form = f"`{name_of(function)}({', '.join(parameters)})`{_place(function)}"
        raise ConfigError(
            f"{key}: {form} is no reward function that is known: "
            "expected reward(samples), or the parameters of TRL (completions), verl (solution_str, ground_truth) or "
            "OpenRLHF (queries, prompts, labels); say which by ppo.reward.sources[].style"
        )
    return "icegrt"


def _place(function: Callable[..., Any]) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f" in {Path(code.co_filename).name}:{code.co_firstlineno}" if code is not None else ""


def _from_trl(function: Callable[..., Any], label_key: str) -> RewardFunction:
    def reward(samples: list[Sample]) -> Any:
        chat = not isinstance(samples[0].row.get("prompt"), str)
        ids = [list(s.tokens) for s in samples]
        columns = {name: [s.row.get(name) for s in samples] for name in samples[0].row}
        for name in ("prompt", "completion", "completion_ids", "messages"):
            columns.pop(name, None)
        given = columns | {
            "prompts": [s.prompt_messages if chat else s.row["prompt"] for s in samples],
            "completions": [[{"role": "assistant", "content": s.text}] if chat else s.text for s in samples],
            "completion_ids": ids,
        }
        if "completions_ids" in inspect.signature(function).parameters:  # as TRL's page spells it
            given["completions_ids"] = ids
        return _mapped(function(**_accepted(function, given)), _none_is_no_opinion)

    return reward


def _none_is_no_opinion(returned: Any) -> list[Any]:
    # TRL leaves out a function that answers None for a task that is not its own.
    return [RewardResult(None) if score is None else score for score in returned]


def _from_verl(function: Callable[..., Any], label_key: str) -> RewardFunction:
    batched = _VERL_BATCH in inspect.signature(function).parameters

    def of(sample: Sample) -> dict[str, Any]:
        return {
            "data_source": sample.row.get("data_source"),
            "solution_str": sample.text,
            "ground_truth": _ground_truth(sample, label_key),
            "extra_info": _extra_info(sample.row.get("extra_info")),
        }

    def reward(samples: list[Sample]) -> Any:
        rows = [of(sample) for sample in samples]
        if batched:
            columns = {("extra_infos" if n == "extra_info" else f"{n}s"): [row[n] for row in rows] for n in rows[0]}
            return _mapped(function(**_accepted(function, columns)), lambda found: [_verl_result(x) for x in found])
        found = [function(**_accepted(function, row)) for row in rows]
        if any(inspect.isawaitable(x) for x in found):
            return _mapped(_gathered(found), lambda done: [_verl_result(x) for x in done])
        return [_verl_result(x) for x in found]

    return reward


def _extra_info(given: Any) -> Any:
    # verl hands over a dict whether or not the data have the column, and adds what it knows of a conversation's turns.
    added = {"num_turns": None, "rollout_reward_scores": {}}
    return added | dict(given or {}) if given is None or isinstance(given, Mapping) else given


def _ground_truth(sample: Sample, label_key: str) -> Any:
    if label_key:
        return _column(sample, label_key)
    nested = sample.row.get("reward_model")
    if isinstance(nested, Mapping) and "ground_truth" in nested:
        return nested["ground_truth"]
    if "ground_truth" in sample.row:
        return sample.row["ground_truth"]
    raise RewardError(
        f"{sample.where}: a function of verl's form needs the column reward_model.ground_truth (or ground_truth); "
        f"found {', '.join(sample.row)}; name another one by ppo.reward.sources[].label_key"
    )


def _verl_result(returned: Any) -> Any:
    if not isinstance(returned, Mapping):
        return returned
    if "score" not in returned:
        return None  # refused by the caller, which names the row
    metrics = {k: v for k, v in returned.items() if k != "score" and is_finite_number(v, boolean=True)}
    return RewardResult(returned["score"] if returned["score"] is not None else float("nan"), metrics)


def _from_openrlhf(function: Callable[..., Any], label_key: str) -> RewardFunction:
    def reward(samples: list[Sample]) -> Any:
        given = {
            "queries": [s.prompt + s.text for s in samples],
            "prompts": [s.prompt for s in samples],
            "labels": [_label(s, label_key) for s in samples],
        }
        return _mapped(function(**_accepted(function, given)), lambda found: _openrlhf_results(found, len(samples)))

    return reward


def _label(sample: Sample, label_key: str) -> Any:
    if label_key:
        return _column(sample, label_key)
    return next((sample.row[name] for name in _LABELS if name in sample.row), "")


def _openrlhf_results(returned: Any, count: int) -> Any:
    if not isinstance(returned, Mapping):
        return _plain(returned)
    scores, logs = _plain(returned.get("rewards")), returned.get("extra_logs") or {}
    if not isinstance(scores, Sequence) or len(scores) != count:
        return scores  # refused by the caller
    columns = {}
    for name, value in logs.items():
        value = _plain(value)
        columns[name] = value if isinstance(value, list) and len(value) == count else [value] * count
    rows = ({n: c[i] for n, c in columns.items() if is_finite_number(c[i], boolean=True)} for i in range(count))
    return [RewardResult(float("nan") if s is None else s, m) for s, m in zip(scores, rows, strict=True)]


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _column(sample: Sample, name: str) -> Any:
    if name not in sample.row:
        raise RewardError(
            f"{sample.where}: no column `{name}`, which ppo.reward.sources[].label_key names; found "
            f"{', '.join(sample.row)}"
        )
    return sample.row[name]


def _accepted(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    if any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        return given
    return {name: value for name, value in given.items() if name in parameters}


def _mapped(returned: Any, change: Callable[[Any], Any]) -> Any:
    """`change(returned)`, awaited first where it must be; what is no list is left for the caller to refuse."""
    if inspect.isawaitable(returned):

        async def finish() -> Any:
            return _mapped(await returned, change)

        return finish()
    return returned if returned is None or isinstance(returned, (str, bytes, float, int)) else change(returned)


async def _gathered(found: list[Any]) -> list[Any]:
    async def one(x: Any) -> Any:
        return await x if inspect.isawaitable(x) else x

    return await asyncio.gather(*(one(x) for x in found))
