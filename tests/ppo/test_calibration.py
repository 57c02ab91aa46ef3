"""Value calibration: bias and explained variance by position and length, against loops in float64."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from icegrt.config import PPOConfig, SamplingConfig
from icegrt.metrics import calibration_path, drop_rollouts
from icegrt.ppo.calibration import CalibrationWriter, bucket_starts, value_calibration
from icegrt.ppo.trainer import PPOTrainer
from icegrt.report.calibration import calibration_charts, figures, merged_tables
from tests.helpers import tiny_models as tiny
from tests.ppo.test_lambdas import masked_plan

MASKS = [[True] * 9, [True, True, False, True], [True], [False, True, True, True, False, True, True], [False] * 3]
CASES = {
    "one lambda": {},
    "lambda 1": {"lam_policy": 0.9, "lam_value": 1.0},
    "discounted": {"lam": 0.5, "gamma": 0.9, "bootstrap_truncated": True},
    "turns": {"advantage_unit": "turn", "lam_value": 0.7},
}


def test_buckets_begin_at_rounded_powers():
    assert bucket_starts(1, 2) == [1]
    assert bucket_starts(8, 1) == [1, 2, 4, 8]
    assert bucket_starts(40, 2) == [1, 2, 3, 4, 6, 8, 12, 16, 23, 32]
    assert bucket_starts(9, 4) == [1, 2, 3, 4, 5, 6, 7, 8]


def drawn_experience(seed=0):
    """An experience of masked responses whose rewards, values and returns are drawn, and the values after the end."""
    plan, generator = masked_plan([len(mask) for mask in MASKS], MASKS), torch.Generator().manual_seed(seed)
    size = int(plan.cu_actions[-1])
    value, returns, reward = (torch.randn(size, generator=generator) for _ in range(3))
    shaped = SimpleNamespace(return_A=returns, reward_A=torch.where(plan.mask_A, reward, 0.0))
    experience = SimpleNamespace(plan=plan, value_A=value, shaped=shaped)
    return experience, torch.randn(len(MASKS), generator=generator)


def monte_carlo(rewards, units, gamma, last):
    """The discounted rewards that follow each unit; `last` comes after the last one."""
    following, returns = last, []
    for unit in reversed(units):
        following = sum(rewards[t] for t in unit) + gamma * following
        returns.insert(0, following)
    return returns


def units_of(mask, begin, unit):
    """Rows of each step of the recursion: tokens, or runs of unmasked tokens."""
    units = []
    for t, counts in enumerate(mask):
        if counts and unit == "turn" and t and mask[t - 1]:
            units[-1].append(begin + t)
        elif counts:
            units.append([begin + t])
    return units


def oracle(config, experience, last_value):
    """(value, return, position, length) of each unit, at each lambda."""
    plan, shaped = experience.plan, experience.shaped
    rows = {config.value_lambda: [], 1.0: []}
    bounds = plan.cu_actions.tolist()
    for n, (begin, end) in enumerate(pairwise(bounds)):
        mask = plan.mask_A[begin:end].tolist()
        units = units_of(mask, begin, config.advantage_unit)
        last = float(last_value[n]) if config.bootstrap_truncated and plan.truncated_N[n] else 0.0
        returns = monte_carlo(shaped.reward_A.double().tolist(), units, config.gamma, last)
        for unit, following in zip(units, returns, strict=True):
            t = unit[0]
            row = float(experience.value_A[t]), t - begin + 1, sum(mask)
            if config.value_lambda != 1.0:
                rows[1.0].append((row[0], following, *row[1:]))
            rows[config.value_lambda].append((row[0], float(shaped.return_A[t]), *row[1:]))
    return rows


@pytest.mark.parametrize("case", CASES)
def test_tables_are_those_of_the_loop(case, cluster):
    config = PPOConfig(**CASES[case], sampling=SamplingConfig(max_new_tokens=8))
    experience, last_value = drawn_experience()
    tables = value_calibration(config, experience, last_value, cluster)
    rows = oracle(config, experience, last_value)
    assert [(t["lambda"], t["by"]) for t in tables] == [(lam, by) for lam in rows for by in ("position", "length")]
    for table in tables:
        column, counted = {"position": 2, "length": 3}[table["by"]], 0
        shown = {round(2**x): (bias, explained) for x, bias, explained in figures(table)}
        limits = [*table["first"], 10**9]
        for first, limit in pairwise(limits):
            members = [row for row in rows[table["lambda"]] if first <= row[column] < limit]
            counted += len(members)
            if not members:
                assert first not in shown
                continue
            values, returns = (torch.tensor([row[i] for row in members], dtype=torch.float64) for i in (0, 1))
            bias, explained = shown[first]
            assert bias == pytest.approx(float((values - returns).mean()), rel=1e-9, abs=1e-12)
            if len(members) > 1:
                ratio = (values - returns).var(correction=0) / returns.var(correction=0)
                assert explained == pytest.approx(1 - float(ratio), rel=1e-6, abs=1e-9)
        assert counted == len(rows[table["lambda"]]) == sum(table["count"])


def test_sums_of_iterations_add_up_and_a_resumed_run_drops_later_ones(tmp_path, cluster):
    config, tables = PPOConfig(sampling=SamplingConfig(max_new_tokens=8)), []
    for iteration in (1, 2, 3):
        tables.append(value_calibration(config, *drawn_experience(iteration), cluster))
        CalibrationWriter().write(tmp_path, iteration, tables[-1])
    drop_rollouts(tmp_path, after=2)
    assert not calibration_path(tmp_path, 3).exists()
    documents = [json.loads(calibration_path(tmp_path, i).read_text()) for i in (1, 2)]
    for table, first, second in zip(merged_tables(documents), *tables[:2], strict=True):
        assert table["count"] == [a + b for a, b in zip(first["count"], second["count"], strict=True)]
        assert table["error_sq_sum"] == pytest.approx(
            [a + b for a, b in zip(first["error_sq_sum"], second["error_sq_sum"], strict=True)]
        )
    charts = calibration_charts(tmp_path)
    assert charts["iterations"] == "iterations 1 to 2"
    assert [chart["title"] for chart in charts["charts"]] == [
        "Value bias by position",
        "Explained variance by position",
        "Value bias by length",
        "Explained variance by length",
    ]
    # Positions are on a logarithmic axis.
    svg = charts["charts"][0]["svg"]
    assert "position of the token in its response" in svg and all(f">{x}</text>" in svg for x in (1, 2, 4, 8))
    assert calibration_charts(tmp_path / "nothing") is None


def test_pretraining_is_not_in_the_charts_of_ppo(tmp_path, cluster):
    config, texts = PPOConfig(sampling=SamplingConfig(max_new_tokens=8), lam_value=1.0), []
    for iteration, pretraining in enumerate((True, True, False, False), 1):
        tables = value_calibration(config, *drawn_experience(iteration), cluster)
        CalibrationWriter().write(tmp_path, iteration, tables, pretraining=pretraining)
        charts = calibration_charts(tmp_path)
        texts.append(charts["iterations"])
    assert texts == [
        "iteration 1 of value pretraining",
        "iterations 1 to 2 of value pretraining",
        "iteration 3 (those of value pretraining are left out)",
        "iterations 3 to 4 (those of value pretraining are left out)",
    ]
    alone = tmp_path / "alone"
    alone.mkdir()
    for iteration in (3, 4):
        CalibrationWriter().write(alone, iteration, value_calibration(config, *drawn_experience(iteration), cluster))
    assert [c["svg"] for c in calibration_charts(alone)["charts"]] == [c["svg"] for c in charts["charts"]]


def test_returns_that_do_not_vary_have_no_explained_variance():
    table = {"first": [1], "count": [2.0], "return_sum": [6.0], "return_sq_sum": [18.0]}
    ((_, bias, explained),) = figures(table | {"error_sum": [1.0], "error_sq_sum": [1.0]})
    assert bias == 0.5 and explained != explained


def test_a_run_records_it_and_its_page_shows_it(tmp_path):
    models = tiny.causal_lm(0), tiny.tokenizer(), tiny.scorer(1), tiny.PROMPTS
    with PPOTrainer(tiny.ppo_config(tmp_path / "run", iterations=2), *models) as run:
        steps = list(run)
        run.write_report()
    tables = [json.loads(calibration_path(run.dir, i).read_text())["tables"] for i in (1, 2)]
    for table, step in zip(tables, steps, strict=True):
        learned = [t for t in table if t["lambda"] == 0.95 and t["by"] == "length"]
        assert sum(learned[0]["count"]) == step.response_tokens
        # The advantage is what the value lacks of the return at one lambda.
        assert sum(learned[0]["error_sum"]) / step.response_tokens == pytest.approx(-step.advantage_mean, abs=1e-5)
    page = (run.dir / "report.html").read_text()
    assert "Value calibration" in page and "returns at lambda 1" in page and "iterations 1 to 2" in page
