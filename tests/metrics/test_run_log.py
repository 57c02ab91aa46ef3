"""Metrics files: valid JSON whatever the numbers, no step twice after a resume, whole files or none."""

import dataclasses
import json
import math
import os

import numpy as np
import pytest
import torch

from icegrt.errors import DataError, RunError
from icegrt.metrics import Evaluation, PPOStep, RewardStep, RunLog, SFTStep, read_metrics, rollout_path, step_from_row
from icegrt.utils.files import JsonlWriter, json_safe

OPTIONAL = {"reward_model_score_mean", "function_score_mean", "ptx_loss", "evaluation", "seconds_by_phase"}


def ppo_step(iteration=1, **changes):
    names = [f.name for f in dataclasses.fields(PPOStep) if f.name not in OPTIONAL | {"iteration"}]
    return PPOStep(iteration=iteration, **(dict.fromkeys(names, 0.5) | changes))


def evaluation(iteration=0, **changes):
    names = ("prompts", "score_mean", "kl_nats_per_response", "response_tokens_mean", "truncated_fraction")
    return Evaluation(iteration=iteration, distinct_fraction=1.0, **(dict.fromkeys(names, 1) | changes))


def strict(line):
    return json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_step_comes_back_as_it_was_written(tmp_path):
    step = ppo_step(3, seconds_by_phase={"rollout": 1.5}, evaluation=evaluation(3, function_score_mean=0.7))
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log(evaluation(0))
        log.log(step)
    rows = read_metrics(tmp_path)
    assert [row["kind"] for row in rows] == ["evaluation", "ppo"]
    assert step_from_row(rows[0]) == evaluation(0)
    assert step_from_row(rows[1] | {"a_later_field": 1}) == step


def test_every_line_is_json_and_flushed(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    log.log(ppo_step(1, policy_loss=math.nan, ratio_max=math.inf, ratio_min=-math.inf, score_mean=np.float32(0.25)))
    log.log(SFTStep(step=1, epoch=0.1, loss=torch.tensor(2.0), tokens=7, tokens_per_second=1.0, lr=0.0, grad_norm=1.0))
    log.log(RewardStep(step=2, epoch=0.1, loss=0.7, accuracy=0.5, lr=0.0, grad_norm=1.0))
    rows = [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    log.close()
    assert (rows[0]["policy_loss"], rows[0]["ratio_max"], rows[0]["ratio_min"]) == ("NaN", "Infinity", "-Infinity")
    assert rows[0]["score_mean"] == 0.25 and rows[1]["loss"] == 2.0 and rows[2]["heldout_loss"] is None
    first = read_metrics(tmp_path)[0]
    assert math.isnan(first["policy_loss"]) and first["ratio_min"] == -math.inf


def test_resume_drops_later_steps_and_a_torn_line(tmp_path):
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log(evaluation(0))
        for i in range(1, 6):
            log.log(ppo_step(i))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
    with RunLog(tmp_path, resume_from_step=3, tensorboard=False) as log:
        log.log(ppo_step(4, score_mean=9.0))
    lines = path.read_text().splitlines()
    assert [strict(line)["iteration"] for line in lines] == [0, 1, 2, 3, 4]
    assert strict(lines[-1])["score_mean"] == 9.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_step_logged_twice_counts_once(tmp_path):
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log(evaluation(0, score_mean=1.0))
        log.log(evaluation(0, score_mean=2.0))
    assert [row["score_mean"] for row in read_metrics(tmp_path)] == [2.0]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "sft", "step": 1}\n{"kind": \n{"kind": "sft", "step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path)


def test_a_new_run_does_not_append_to_another(tmp_path):
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log(ppo_step(1))
    with pytest.raises(RunError, match="resume"):
        RunLog(tmp_path)
    assert read_metrics(tmp_path / "nowhere") == []


def test_tensorboard_has_nested_scalars_and_skips_what_is_missing(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path) as log:
        log.log(ppo_step(1, seconds_by_phase={"rollout": 1.5}, evaluation=evaluation(1)))
        log.log(ppo_step(2))
    with RunLog(tmp_path, resume_from_step=1) as log:
        log.log(ppo_step(2, score_mean=7.0))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    assert {"ppo/score_mean", "ppo/seconds_by_phase/rollout", "evaluation/score_mean"} <= set(tags)
    assert "ppo/ptx_loss" not in tags
    assert [(e.step, e.value) for e in events.Scalars("ppo/score_mean")] == [(1, 0.5), (2, 7.0)]


def test_rollouts_are_whole_or_absent(tmp_path):
    path = rollout_path(tmp_path, 12)
    assert path == tmp_path / "rollouts" / "iteration_00012.jsonl"
    odd = "line\u2028separator \ud800 \x00 \u4e2d"
    with JsonlWriter(path) as writer:
        writer.write({"text": odd, "score": math.nan})
        assert not path.exists()
    assert [strict(line) for line in path.read_bytes().split(b"\n")[:-1]] == [{"text": odd, "score": "NaN"}]
    with pytest.raises(KeyError), JsonlWriter(rollout_path(tmp_path, 13)) as writer:
        writer.write({})
        raise KeyError
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_rows_that_cannot_be_written_leave_no_file(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"), JsonlWriter(tmp_path / "rows.jsonl") as writer:
        writer.write({})
    assert list(tmp_path.iterdir()) == []


def test_json_safe_takes_arrays_and_refuses_the_rest():
    value = {"a": np.arange(2), 1: (torch.tensor(1.5), None), "b": np.bool_(True), "c": [math.inf]}
    assert json_safe(value) == {"a": [0, 1], "1": [1.5, None], "b": True, "c": ["Infinity"]}
    assert json_safe(value, not_finite_as_null=True)["c"] == [None]
    with pytest.raises(TypeError, match="object"):
        json_safe(object())
