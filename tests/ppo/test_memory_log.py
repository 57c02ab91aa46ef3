"""A run writes measured peaks of memory beside the planned ones."""

import json

import pytest
import torch

from icegrt.config.loader import as_dict
from icegrt.errors import ConfigError
from icegrt.ppo.memory_log import MemoryPlan, PeakMeter
from icegrt.ppo.trainer import PPOTrainer
from icegrt.utils.files import json_safe
from tests.helpers import tiny_models as tiny

PEAKS = {"rollout": 3, "score": 2, "shape": 1, "update": 4}


def write_plan(path, config, gpus=1):
    path.write_text(json.dumps({"gpus": gpus, "peaks": PEAKS, "config": json_safe(as_dict(config))}))
    return str(path)


def train(config):
    with PPOTrainer(config, tiny.causal_lm(0), tiny.tokenizer(), tiny.count_letters, tiny.PROMPTS) as trainer:
        trainer.train()


def configuration(folder, **keys):
    return tiny.ppo_config(folder, critic={"init": "actor"}, iterations=2, **keys)


def test_a_run_writes_planned_beside_measured(tmp_path, capsys):
    plan = write_plan(tmp_path / "plan.json", configuration(tmp_path / "planned"))
    train(configuration(tmp_path / "run", memory_plan=plan))
    log = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert log["planned"] == PEAKS and log["iterations"] == 2 and "resident memory" in log["measure"]
    assert set(PEAKS) <= set(log["measured"])
    captured = capsys.readouterr()
    assert captured.out.count("peak memory, planned and measured") == 1
    assert "another run" not in captured.err  # the folder of the run changes no peak


def test_a_plan_of_another_run_is_a_warning_with_its_keys(tmp_path, capsys):
    plan = write_plan(tmp_path / "plan.json", configuration(tmp_path / "planned", token_budget=70), gpus=4)
    train(configuration(tmp_path / "run", memory_plan=plan))
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "another run" in line)
    assert "ppo.token_budget=70" in line and "4 ranks (the run: 1)" in line and "run.dir" not in line


def test_without_a_plan_nothing_is_written(tmp_path):
    train(configuration(tmp_path / "run"))
    assert not (tmp_path / "run" / "memory.json").exists()


@pytest.mark.parametrize("text", [None, "{", "[]", '{"gpus": 1}'])
def test_a_file_that_is_no_plan_is_refused(tmp_path, text):
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"ppo.memory_plan: .*plan.json is no plan"):
        MemoryPlan.read(str(path))


def test_the_meter_sees_memory_that_is_resident_for_a_while():
    size = 64 << 20
    meter = PeakMeter(torch.device("cpu"))
    meter.reset()
    torch.ones(size, dtype=torch.uint8)
    assert 0.9 * size < meter.peak() < 1.5 * size
