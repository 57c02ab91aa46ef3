"""Users' reward functions: how they are found, what they are given, and what they may return."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from icegrt.errors import ConfigError, RewardError
from icegrt.rewards.error_policy import call_reward_function
from icegrt.rewards.function import load_reward_function
from icegrt.rewards.sample import Sample


def sample(text="hello", where="data.jsonl:3", **row):
    return Sample(text, [5, 1], "hi", [2, 3], "stop", row or {"prompt": "hi"}, where, 0)


def turn(role, content):
    return {"role": role, "content": content}


SAMPLES = [sample("one", "data.jsonl:1"), sample("two", "data.jsonl:2"), sample("three", "data.jsonl:3")]


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2.5, -3],
        (1, 2.5, -3),
        np.array([1, 2.5, -3]),
        torch.tensor([1, 2.5, -3]),
        torch.tensor([[1], [2.5], [-3]]),
        [np.float32(1), torch.tensor(2.5), -3],
        iter([1, 2.5, -3]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_sequence_of_finite_numbers_serves(returned):
    scores = call_reward_function(lambda samples: returned, SAMPLES)
    assert scores == [1.0, 2.5, -3.0] and all(type(score) is float for score in scores)


def test_a_score_of_zero_is_a_score():
    assert call_reward_function(lambda samples: [0, 0.0, -0.0], SAMPLES) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "bad",
    [math.nan, math.inf, None, True, np.True_, torch.tensor(True), "1", [1.0, 2.0], torch.ones(2), 10**400, object],
    ids=lambda value: str(value)[:12],
)
def test_what_is_no_finite_number_names_its_row(bad):
    with pytest.raises(RewardError, match=r"data\.jsonl:2; expected a finite number. The answer was: 'two'"):
        call_reward_function(lambda samples: [0.0, bad, 0.0], SAMPLES)


@pytest.mark.parametrize("returned", [None, 1.0, "123", {0: 1, 1: 2, 2: 3}, object()], ids=lambda v: type(v).__name__)
def test_what_is_no_sequence_is_shown(returned):
    with pytest.raises(RewardError, match=r"for 3 samples, the first of which is data\.jsonl:1; expected a list"):
        call_reward_function(lambda samples: returned, SAMPLES)


@pytest.mark.parametrize("count", [0, 2, 4])
def test_the_wrong_number_of_scores(count):
    with pytest.raises(RewardError, match=f"returned {count} scores for 3 samples"):
        call_reward_function(lambda samples: [0.0] * count, SAMPLES)


def test_an_exception_names_the_row_that_caused_it():
    def parse(samples):
        return [1.0 / (s.text != "two") for s in samples]

    def lazily(samples):
        for s in samples:
            yield 1.0 / (s.text != "two")

    for function in (parse, lazily):
        with pytest.raises(
            RewardError, match=r"raised ZeroDivisionError.*at data\.jsonl:2, answer 'two'"
        ) as error_info:
            call_reward_function(function, SAMPLES)
        assert isinstance(error_info.value.__cause__, ZeroDivisionError)

    def on_many(samples):
        raise RuntimeError("service down") if len(samples) > 1 else ValueError
        yield

    with pytest.raises(RewardError, match="service down"):
        call_reward_function(on_many, SAMPLES)


def test_an_interrupt_is_not_swallowed():
    def interrupted(samples):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_reward_function(interrupted, SAMPLES)


@pytest.mark.parametrize(
    ("row", "before"),
    [
        ({"prompt": "hi"}, [("user", "hi")]),
        ({"prompt": [turn("system", "s"), turn("user", "u")]}, [("system", "s"), ("user", "u")]),
        ({"messages": [turn("user", "u")]}, [("user", "u")]),
        ({"messages": [turn("user", "u"), turn("assistant", "gold")]}, [("user", "u")]),
        (
            {"prompt": "u", "messages": [turn("system", "s"), turn("user", "u"), turn("assistant", "g")]},
            [("user", "u")],
        ),
        ({"prompt": "u", "messages": [turn("user", "u"), turn("assistant", "g"), turn("user", "v")]}, [("user", "u")]),
    ],
)
def test_messages_are_the_prompt_and_the_answer(row, before):
    answered = dataclasses.replace(sample("answer"), row=row)
    assert [(m["role"], m["content"]) for m in answered.messages] == [*before, ("assistant", "answer")]


def test_a_function_of_a_file_may_import_its_neighbours_and_use_dataclasses(tmp_path):
    (tmp_path / "neighbour_of_score.py").write_text("WEIGHT = 2.0\n")
    (tmp_path / "my_score.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom neighbour_of_score import WEIGHT\n"
        "@dataclass\nclass Rule:\n    weight: float = WEIGHT\n"
        "def score(samples):\n    return [Rule().weight * len(s.text) for s in samples]\n"
    )
    function = load_reward_function(f"{tmp_path}/my_score.py:score")
    assert call_reward_function(function, SAMPLES) == [6.0, 6.0, 10.0]


def test_a_function_of_a_module():
    assert load_reward_function("math:fsum") is math.fsum


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("score.py", "expected `file.py:function`"),
        (":f", "expected `file.py:function`"),
        ("x.py:", "expected `file.py:function`"),
        ("gone.py:f", "no file gone.py"),
        ("math:pi", "has no function `pi`"),
        ("math:gone", "has no function `gone`"),
        ("no_such_module_at_all:f", "ModuleNotFoundError"),
        ("{tmp}/broken.py:f", "SyntaxError"),
    ],
)
def test_a_function_that_cannot_be_found_names_the_key(tmp_path, spec, words):
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(ConfigError, match=words) as error_info:
        load_reward_function(spec.format(tmp=tmp_path), "sample.score_function")
    assert str(error_info.value).startswith("sample.score_function: ")
