"""Functions in the documented forms of TRL, verl and OpenRLHF run as they are, told apart by their parameters."""

import asyncio
import functools
import re

import pytest
import torch

from icegrt.data import PromptEncoder, Row
from icegrt.errors import ConfigError, RewardError
from icegrt.rewards.compat import adapt, style_of
from icegrt.rewards.sample import RewardResult
from icegrt.rollout.samples import sample_of
from icegrt.rollout.types import Response
from tests.helpers import reward_cases as cases
from tests.helpers import tiny_models as tiny

# -- as TRL's page has them: https://huggingface.co/docs/trl/main/en/grpo_trainer ----------------------------------


def trl_by_tokens(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def trl_as_the_page_spells_it(completions_ids, **kwargs):
    return [float(len(ids)) for ids in completions_ids]


def trl_format(completions, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(r"^<answer>.*</answer>$", content) else 0.0 for content in contents]


def trl_by_reference(completions, ground_truth, **kwargs):
    return [1.0 if completion == truth else 0.0 for completion, truth in zip(completions, ground_truth, strict=True)]


def trl_of_one_task(prompts, completions, task, **kwargs):
    return [
        float(len(completion)) if t == "math" else None
        for _, completion, t in zip(prompts, completions, task, strict=True)
    ]


async def trl_async(prompts, completions, **kwargs):
    await asyncio.sleep(0)
    return [1.0 if completion else 0.0 for completion in completions]


# -- as verl's: https://verl.readthedocs.io/en/latest/preparation/reward_function.html ------------------------------


def verl_length(data_source, solution_str, ground_truth, extra_info=None):
    return len(solution_str) / 100


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    right = solution_str == ground_truth
    return {
        "score": 1.0 if right else 0.0,
        "acc": right,
        "source": data_source,
        "turns": extra_info.get("turns"),
    }


async def verl_async(data_source, solution_str, ground_truth, extra_info):
    await asyncio.sleep(0)
    return 0.25


def verl_turns(data_source, solution_str, ground_truth, extra_info):
    return float(extra_info["num_turns"] is None and extra_info["rollout_reward_scores"] == {})


def verl_batch(data_sources, solution_strs, ground_truths, extra_infos):
    return [float(s == g) for s, g in zip(solution_strs, ground_truths, strict=True)]


# -- as OpenRLHF's: https://github.com/OpenRLHF/OpenRLHF/blob/main/examples/python/reward_func.py -------------------


def openrlhf_dict(queries, prompts, labels, **kwargs):
    reward = torch.tensor([float(q[len(p) :] == x) for q, p, x in zip(queries, prompts, labels, strict=True)])
    return {"rewards": reward, "scores": reward, "extra_logs": {"right": reward, "share": reward.mean()}}


def openrlhf_tensor(queries, prompts, labels):
    return torch.tensor([float(len(query)) for query in queries])


def ours(samples):
    return [1.0] * len(samples)


class OursAsAnObject:
    def __call__(self, samples):
        return [1.0] * len(samples)


STYLES = {
    "trl": [trl_by_tokens, trl_as_the_page_spells_it, trl_format, trl_by_reference, trl_of_one_task, trl_async],
    "verl": [verl_length, compute_score, verl_async, verl_batch, functools.partial(compute_score, extra_info={})],
    "openrlhf": [openrlhf_dict, openrlhf_tensor],
    "icegrt": [ours, OursAsAnObject(), lambda s, weight=1.0: [weight], lambda *parts: [1.0], print],
}


@pytest.mark.parametrize(("style", "function"), [(s, f) for s, functions in STYLES.items() for f in functions])
def test_the_parameters_say_whose_function_it_is(style, function):
    assert style_of(function) == style


@pytest.mark.parametrize(
    "function",
    [lambda a, b: 0, lambda: 0, lambda *, samples: 0, lambda prompts, answers: 0],
    ids=["ab", "0", "kw", "pa"],
)
def test_a_function_of_no_known_form_is_refused(function):
    with pytest.raises(ConfigError, match=r"is no reward function that is known.*style"):
        style_of(function, "ppo.reward_function")


def score_with(function, samples, **entry):
    with cases.scorers(cases.RewardSpec(function=function, **entry)) as sources:
        (source_scores,) = sources.score_by_source(samples)
    assert source_scores.name == getattr(function, "__name__", "")
    return source_scores


def test_trl_gets_text_for_plain_prompts_and_messages_for_conversations():
    plain = [cases.sample("<answer>4</answer>", prompt="2+2?", ground_truth="<answer>4</answer>", tokens=[7, 8])]
    chat = [cases.sample("<answer>4</answer>", prompt=[{"role": "user", "content": "2+2?"}])]
    for function in (trl_by_tokens, trl_as_the_page_spells_it):
        assert score_with(function, plain).score_or_nan_N == [2.0]
    assert score_with(trl_by_reference, plain).score_or_nan_N == [1.0]
    assert score_with(trl_async, plain).score_or_nan_N == [1.0]
    assert score_with(trl_format, chat).score_or_nan_N == [1.0]
    four = [cases.sample("4", messages=[{"role": "user", "content": "2+2?"}])]
    assert score_with(trl_format, four).score_or_nan_N == [0.0]


def test_trl_sees_every_column_but_the_prompt():
    def reward(prompts, completions, **columns):
        assert prompts == ["2+2?"] and completions == ["4"]
        assert set(columns) == {"completion_ids", "task", "level"} and columns["level"] == [3]
        return [1.0]

    assert score_with(reward, [cases.sample("4", prompt="2+2?", task="math", level=3)]).score_or_nan_N == [1.0]


def test_none_of_trl_is_a_task_of_another_function():
    samples = [cases.sample("abc", 0, prompt="x", task="math"), cases.sample("abc", 1, prompt="x", task="code")]
    source_scores = score_with(trl_of_one_task, samples)
    assert source_scores.results == [RewardResult(3.0), RewardResult(None)] and source_scores.errors == [None, None]


@pytest.mark.parametrize("row", [{"reward_model": {"style": "rule", "ground_truth": "4"}}, {"ground_truth": "4"}])
def test_verl_gets_its_columns_and_may_return_a_dict(row):
    samples = [cases.sample("4", 0, **row, data_source="gsm8k", extra_info={"turns": 2}), cases.sample("5", 1, **row)]
    assert score_with(verl_length, samples).score_or_nan_N == [0.01, 0.01]
    assert score_with(verl_async, samples).score_or_nan_N == [0.25, 0.25]
    assert score_with(verl_batch, samples).score_or_nan_N == [1.0, 0.0]
    assert score_with(verl_turns, samples).score_or_nan_N == [1.0, 1.0]
    source_scores = score_with(compute_score, samples)
    assert source_scores.results == [RewardResult(1.0, {"acc": 1.0, "turns": 2.0}), RewardResult(0.0, {"acc": 0.0})]


def test_openrlhf_gets_whole_texts_and_may_return_a_tensor_or_a_dict():
    samples = [cases.sample("4", 0, label="4"), cases.sample("5", 1, label="4")]
    assert score_with(openrlhf_tensor, samples).score_or_nan_N == [float(len(s.prompt) + 1) for s in samples]
    source_scores = score_with(openrlhf_dict, samples)
    assert source_scores.results == [
        RewardResult(1.0, {"right": 1.0, "share": 0.5}),
        RewardResult(0.0, {"right": 0.0, "share": 0.5}),
    ]


def test_a_label_may_stand_in_any_column():
    samples = [cases.sample("4", solution="4")]
    assert score_with(openrlhf_dict, samples, label_key="solution").score_or_nan_N == [1.0]
    assert score_with(compute_score, samples, label_key="solution").score_or_nan_N == [1.0]
    for function in (openrlhf_dict, compute_score):
        with pytest.raises(RewardError, match=r"data\.jsonl:1: no column `gold`.*found solution"):
            score_with(function, samples, label_key="gold")
    with pytest.raises(RewardError, match=r"data\.jsonl:1: .*reward_model\.ground_truth.*found solution"):
        score_with(compute_score, samples)


def test_the_style_may_be_said():
    def odd(solution_str, ground_truth="", **kwargs):
        return 0.5

    samples = [cases.sample("4", ground_truth="4")]
    assert score_with(odd, samples, style="verl").score_or_nan_N == [0.5]
    with pytest.raises(RewardError, match="TypeError"):
        score_with(ours, samples, style="trl")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda data_source, solution_str, ground_truth: {"acc": 1.0}, "returned None for data.jsonl:1"),
        (lambda data_source, solution_str, ground_truth: {"score": None}, "returned nan for data.jsonl:1"),
        (lambda queries, prompts, labels: {"scores": [1.0]}, "returned None for 1 samples"),
        (lambda queries, prompts, labels: {"rewards": torch.tensor([1.0, 2.0])}, "returned 2 scores for 1 samples"),
        (lambda completions, **kwargs: 1.0, "returned 1.0 for 1 samples"),
        (lambda completions, **kwargs: [1.0, 2.0], "returned 2 scores for 1 samples"),
        (lambda completions, gone, **kwargs: [1.0], "TypeError.*'gone'"),
    ],
)
def test_what_they_return_is_held_to_the_same_word(function, words):
    with pytest.raises(RewardError, match=words):
        score_with(function, [cases.sample("4", prompt="x", ground_truth="4")])


def test_they_run_in_workers_too(tmp_path):
    body = (
        "async def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return {'score': float(solution_str == ground_truth), 'length': len(solution_str)}"
    )
    spec = cases.function_file(tmp_path, body, name="compute_score")
    with cases.scorers(spec, workers=2) as sources:
        (source_scores,) = sources.score_by_source(
            [cases.sample("4", 0, ground_truth="4"), cases.sample("55", 1, ground_truth="4")]
        )
    assert source_scores.results == [RewardResult(1.0, {"length": 1.0}), RewardResult(0.0, {"length": 2.0})]


def test_a_trl_function_gets_all_columns_and_one_form_whichever_rows_a_batch_has():
    rows = [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}], "answer": "x"}, {"prompt": "c"}]
    encoder = PromptEncoder(tiny.tokenizer(), 20)
    prompts = encoder([Row(row, f"row {i}") for i, row in enumerate(rows)])
    calls = []

    def trl(prompts, completions, answer, **columns):
        calls.append((prompts, completions, answer, columns))
        return [0.0] * len(completions)

    reward = adapt(trl)
    for members in ([0], [2, 1], [0, 2]):
        responses = [Response(i, 0, i, prompts[i].tokens, [5, 1], [0.0, 0.0], "stop") for i in members]
        reward([sample_of(tiny.tokenizer(), r, prompts[r.prompt_index]) for r in responses])
    assert [answers for _, _, answers, _ in calls] == [[None], [None, "x"], [None, None]]
    assert {type(p) for prompts, _, _, _ in calls for p in prompts} == {list}
    assert {type(c) for _, completions, _, _ in calls for c in completions} == {list}
    assert calls[0][0] == [[{"role": "user", "content": "a"}]]


def test_a_null_label_is_no_label():
    sample = cases.sample("x", label=None, answer="y", reward_model={"ground_truth": None}, ground_truth="z")
    labels = []
    adapt(lambda queries, prompts, **more: labels.append(more["labels"]) or [0.0])([sample])
    assert labels == [["y"]]
    assert adapt(lambda data_source, solution_str, ground_truth: float(ground_truth == "z"))([sample]) == [1.0]
