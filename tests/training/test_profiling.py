"""`profile`: phases in the trace, files in their place, the same metrics as without, and nothing left running."""

import json
from types import SimpleNamespace

import pytest
import torch

from icegrt.config import PPOConfig, ProfileConfig, RewardConfig, SFTConfig
from icegrt.errors import ConfigError
from icegrt.ppo.trainer import PPOTrainer
from icegrt.report.profile import profile_files
from icegrt.training.profiling import StepProfiler
from icegrt.training.reward_model import RewardTrainer
from icegrt.training.sft import SFTTrainer
from icegrt.utils.trace import trace_range
from tests.helpers import stage_cases as cases
from tests.helpers.ranks import launch

PPO_RANGES = {
    "rollout", "batching", "inference", "advantages", "update", "checkpoint", "iteration 2", "forward: actor",
    "forward: reference", "forward: reward", "forward: critic", "train step: actor", "train step: critic",
    "forward and backward: actor", "forward and backward: critic",
}  # fmt: skip
STAGES = {
    "ppo": (PPOTrainer, PPOConfig, cases.ppo_keys, PPO_RANGES),
    "sft": (SFTTrainer, SFTConfig, cases.sft_keys, {"step 2", "batching", "train step: actor", "evaluation"}),
    "reward": (RewardTrainer, RewardConfig, cases.reward_keys, {"step 2", "batching", "train step: reward"}),
}


def rows(run):
    """The metrics of a run without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k and k != "time"} for line in lines]


def run(home, stage, folder, *overrides):
    kind, config, keys, _ = STAGES[stage]
    with kind(config.load(None, keys(home, folder, *overrides))) as trainer:
        trainer.train()
    return folder


def range_names(path):
    events = json.loads(path.read_text())["traceEvents"]
    return {event["name"] for event in events if event.get("cat") == "user_annotation"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_profiled_run_has_its_phases_and_the_same_metrics(home, tmp_path, stage):
    plain = run(home, stage, tmp_path / "plain")
    profiled = run(home, stage, tmp_path / "profiled", f"{stage}.profile.steps=3")  # skip=1, and the run has 2 steps
    assert rows(profiled) == rows(plain)
    names = range_names(profiled / "profile" / "trace_rank0.json")
    assert STAGES[stage][3] <= names
    assert not {"iteration 1", "step 1"} & names
    summary = (profiled / "profile" / "summary_rank0.txt").read_text()
    assert "Operators, by the time in themselves" in summary and "aten::" in summary
    assert "Idle: " in summary and "Memory allocated" in summary
    assert profile_files(profiled) == ["profile/summary_rank0.txt", "profile/trace_rank0.json"]
    assert 'href="profile/summary_rank0.txt"' in (profiled / "report.html").read_text()
    assert not (plain / "profile").exists() and "Profiles" not in (plain / "report.html").read_text()
    assert not torch.autograd._profiler_enabled()


def test_memory_and_stacks_are_choices(home, tmp_path):
    keys = ("sft.profile.steps=1", "sft.profile.skip=0", "sft.profile.memory=false", "sft.profile.with_stack=true")
    folder = run(home, "sft", tmp_path / "run", *keys) / "profile"
    events = json.loads((folder / "trace_rank0.json").read_text())["traceEvents"]
    assert any(event.get("cat") == "python_function" for event in events)
    assert not any(event["name"] == "[memory]" for event in events)
    assert "Memory" not in (folder / "summary_rank0.txt").read_text()
    assert {"step 1"} <= range_names(folder / "trace_rank0.json")
    assert "step 2" not in range_names(folder / "trace_rank0.json")


def test_a_failed_step_stops_the_profiler_and_leaves_no_file(home, tmp_path):
    class Failing:
        def on_update(self, trainer, step):
            raise RuntimeError("in the profiled step")

    config = SFTConfig.load(None, cases.sft_keys(home, tmp_path / "run", "sft.profile.steps=1", "sft.profile.skip=0"))
    with pytest.raises(RuntimeError, match="in the profiled step"):
        with SFTTrainer(config, callbacks=[Failing()]) as trainer:
            trainer.train()
    assert not torch.autograd._profiler_enabled()
    assert profile_files(tmp_path / "run") == []


def test_a_run_that_ends_before_the_first_profiled_step_warns(home, tmp_path, capsys):
    run(home, "sft", tmp_path / "run", "sft.profile.steps=1", "sft.profile.skip=9")
    assert "sft.profile.skip is 9: the run ended before a step was profiled" in capsys.readouterr().err
    assert not (tmp_path / "run" / "profile").exists()


@pytest.mark.parametrize(
    ("key", "value"), [("steps", -1), ("steps", 1.5), ("skip", -1), ("ranks", [0.5]), ("memory", "yes"), ("stepz", 3)]
)
def test_bad_values_are_refused(key, value):
    with pytest.raises(ConfigError, match=key):
        ProfileConfig(**{key: value})


@pytest.mark.parametrize("ranks", ["[1]", "[-1]"])
def test_a_rank_that_does_not_exist_is_refused(home, tmp_path, ranks):
    keys = cases.sft_keys(home, tmp_path / "run", "sft.profile.steps=1", f"sft.profile.ranks={ranks}")
    with pytest.raises(ConfigError, match=r"sft.profile.ranks: -?1 is no rank of this run, which has 1"):
        SFTTrainer(SFTConfig.load(None, keys))


def test_a_range_without_a_profiler_records_nothing():
    with trace_range("nothing") as recorded:
        assert recorded is None


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_named_ranks_are_profiled(tmp_path, rank):
    cluster = SimpleNamespace(rank=rank, world_size=2)
    profiler = StepProfiler(ProfileConfig(steps=1, skip=0, ranks=[1]), "sft", cluster, tmp_path, "steps")
    with profiler.step(1, lambda: True):
        assert torch.autograd._profiler_enabled() == (rank == 1)
        torch.ones(2).add(1)
    assert profile_files(tmp_path) == ([] if rank == 0 else ["profile/summary_rank1.txt", "profile/trace_rank1.json"])


def profile_on_two_ranks(home, folder):
    for steps in (0, 1):
        run(home, "ppo", folder / str(steps), f"ppo.profile.steps={steps}", "ppo.profile.ranks=[]")


@pytest.mark.timeout(600)
def test_ranks_write_a_file_each(home, tmp_path):
    launch(2, profile_on_two_ranks, home, tmp_path)
    for rank in (0, 1):
        assert range_names(tmp_path / "1" / "profile" / f"trace_rank{rank}.json") >= PPO_RANGES
        assert (tmp_path / "1" / "profile" / f"summary_rank{rank}.txt").exists()
    assert rows(tmp_path / "1") == rows(tmp_path / "0")
