"""A run that is resumed in a fresh process goes on to the bit as if it had never stopped; half a checkpoint is none.

This file is also the script of the fresh process: it resumes the runs in the folders it is given and takes two steps.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from icegrt.checkpoint import directory as files
from icegrt.checkpoint.megatron import inner_optimizers
from icegrt.config import CriticConfig, DataSource, OptimizerConfig, SFTConfig
from icegrt.errors import CheckpointError, RunError
from icegrt.metrics import read_metrics
from icegrt.ppo.trainer import PPOTrainer
from icegrt.training.sft import SFTTrainer
from tests.helpers import tiny_models as tiny

OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1, warmup_fraction=0.2, schedule="cosine")
ROWS = [{"prompt": word, "response": tiny.WORDS[-n]} for n, word in enumerate(tiny.WORDS)]
BEFORE, AFTER = 2, 2


def sft(folder: Path, resume: bool) -> SFTTrainer:
    data = folder.parent / "ptx.jsonl"
    config = SFTConfig(
        epochs=4, batch_sequences=3, token_budget=24, optimizer=OPTIMIZER, run={"dir": str(folder), "resume": resume}
    )
    return SFTTrainer(config, tiny.causal_lm(0), tiny.tokenizer(), str(data), heldout=ROWS[:2])


def ppo(folder: Path, resume: bool, dtype="fp32", extra_rewards=(), **changes) -> PPOTrainer:
    config = tiny.ppo_config(
        folder,
        **{
            "iterations": 6,
            "checkpoint_every": BEFORE,
            "kl_control": "adaptive",
            "kl_horizon_responses": 100,
            "ptx_coef": 0.1,
            "ptx_data": [DataSource(path=str(folder.parent / "ptx.jsonl"), weight=0.7)],
            "ptx_sequences": 2,
            "score_shift": True,
            "optimizer": OPTIMIZER,
            "critic": CriticConfig(warmup_iterations=1, optimizer=OPTIMIZER),
            "run": {"resume": resume, "dtype": dtype},
        }
        | changes,
    )
    reward = [tiny.scorer(1), tiny.count_letters, *extra_rewards]
    return PPOTrainer(config, tiny.causal_lm(0), tiny.tokenizer(), reward, tiny.PROMPTS, eval_prompts=tiny.PROMPTS[:3])


RUNS = {
    "sft": sft,
    "ppo": ppo,
    "ppo_bf16": lambda folder, resume: ppo(folder, resume, "bf16"),
    "ppo_lora": lambda folder, resume: ppo(
        folder,
        resume,
        "bf16",
        sharing="lora",
        lora={"rank": 3},
        critic=CriticConfig(init="actor", warmup_iterations=1, optimizer=OPTIMIZER),
    ),
    "ppo_two_reward_models": lambda folder, resume: ppo(folder, resume, extra_rewards=[(tiny.scorer(2), -0.7)]),
    "ppo_warming_up": lambda folder, resume: ppo(
        folder, resume, critic=CriticConfig(warmup_iterations=BEFORE + 1, optimizer=OPTIMIZER)
    ),
}


def figures(step) -> dict:
    """A step's metrics without those that a clock made."""
    row = dataclasses.asdict(step)
    return {name: x for name, x in row.items() if "seconds" not in name and "per_second" not in name}


def complete_state(trainer) -> dict:
    """Weights and the rest of a trainer's state."""
    tensors = {f"{role.name}.{name}": p for role in trainer.roles for name, p in tiny.parameters(role).items()}
    for role in trainer.roles:
        for entry in inner_optimizers(role.optimizer):
            states = entry.optimizer.state.values()
            tensors |= {f"{role.name}.{n}.{k}": v.clone() for n, s in enumerate(states) for k, v in s.items()}
    return {"tensors": tensors, "state": trainer.state(), "schedules": [r.schedule.state_dict() for r in trainer.roles]}


def go_on(trainer) -> dict:
    steps = [figures(trainer.step()) for _ in range(AFTER)]
    return complete_state(trainer) | {"steps": steps}


def resume(folders: list[str]) -> None:
    """The fresh process."""
    torch.set_num_threads(1)
    for folder in map(Path, folders):
        with RUNS[folder.name](folder, resume=True) as trainer:
            torch.save(go_on(trainer), folder / "resumed.pt")


@pytest.fixture(scope="module")
def resumed_runs(tmp_path_factory):
    """What each run did after its checkpoint: uninterrupted, and resumed in another process from a copy."""
    runs = tmp_path_factory.mktemp("runs")
    (runs / "copy").mkdir()
    for folder in (runs, runs / "copy"):
        (folder / "ptx.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    uninterrupted = {}
    for name, make in RUNS.items():
        with make(runs / name, resume=False) as trainer:
            for _ in range(BEFORE):
                trainer.step()
            if name == "sft":
                trainer.save_checkpoint()
            shutil.copytree(runs / name, runs / "copy" / name)
            uninterrupted[name] = go_on(trainer)
    folders = [str(runs / "copy" / name) for name in RUNS]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.test_resume", *folders],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr
    return {name: (uninterrupted[name], torch.load(Path(f) / "resumed.pt"), Path(f)) for name, f in zip(RUNS, folders)}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(name, resumed_runs):
    expected, resumed, _ = resumed_runs[name]
    resumed_tensors, uninterrupted = resumed["tensors"], expected["tensors"]
    assert resumed_tensors.keys() == uninterrupted.keys()
    assert [n for n in uninterrupted if not torch.equal(resumed_tensors[n], uninterrupted[n])] == []
    assert resumed["schedules"] == expected["schedules"]
    assert any(n.endswith("exp_avg") and x.any() for n, x in uninterrupted.items())


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_reports_the_figures_of_an_uninterrupted_one(name, resumed_runs):
    expected, resumed, folder = resumed_runs[name]
    assert resumed["steps"] == expected["steps"]
    rows = [row for row in read_metrics(folder) if row["kind"] != "evaluation"]
    assert len(rows) == BEFORE + AFTER


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_remembers_what_an_uninterrupted_one_does(name, resumed_runs):
    # Data position, KL controller, score moments; and alarms, that of the checkpoint's own iteration included.
    expected, resumed, _ = resumed_runs[name]
    assert resumed["state"] == expected["state"]


def test_only_the_last_checkpoints_are_kept_and_half_written_ones_are_not_seen(tmp_path):
    (tmp_path / "ptx.jsonl").write_text(json.dumps(ROWS[0]))
    saved = []
    with ppo(tmp_path / "run", False, checkpoint_every=1, keep_checkpoints=2, ptx_coef=0.0) as trainer:
        for _ in range(2):
            saved.append(trainer.step())
        left_over = files.checkpoints_dir(trainer.dir) / "step_000009.writing"
        left_over.mkdir()
        (left_over / "state.json").write_text("{")
        trainer.step()
        checkpoint_names = [p.name for p in files.list_checkpoints(trainer.dir)]
    assert checkpoint_names == ["step_000002", "step_000003"]
    with ppo(tmp_path / "run", True, checkpoint_every=50, ptx_coef=0.0) as resumed:
        assert resumed.done_steps == 3
    (files.checkpoints_dir(resumed.dir) / "step_000003" / "state.json").write_text('{"step"')
    with ppo(tmp_path / "run", True, checkpoint_every=50, ptx_coef=0.0) as resumed:
        assert resumed.done_steps == 2
    shutil.rmtree(files.checkpoints_dir(resumed.dir) / "step_000002" / "critic")
    with pytest.raises(CheckpointError, match=r"step_000002: damaged: critic/.* is missing, and \d+ more"):
        ppo(tmp_path / "run", True, ptx_coef=0.0)


def test_a_run_is_neither_resumed_from_nothing_nor_started_over_another(tmp_path):
    (tmp_path / "ptx.jsonl").write_text(json.dumps(ROWS[0]))
    for make in (sft, ppo):
        with pytest.raises(RunError, match="no checkpoint to resume from"):
            make(tmp_path / "run", True)
        (tmp_path / "full").mkdir(exist_ok=True)
        (tmp_path / "full" / "anything").touch()
        with pytest.raises(RunError, match="not empty, and not the folder of a run"):
            make(tmp_path / "full", False)
        writing = files.checkpoints_dir(tmp_path / "half") / "step_000001.writing"
        writing.mkdir(parents=True, exist_ok=True)
        with pytest.raises(RunError, match="no checkpoint to resume from"):
            make(tmp_path / "half", True)


def test_checkpoints_are_found_in_the_order_of_their_steps(tmp_path):
    folder = files.checkpoints_dir(tmp_path)
    assert files.list_checkpoints(tmp_path) == []
    for name in ("step_1000000", "step_000020", "step_000003", "step_000004.writing", "notes", "step_12"):
        (folder / name).mkdir(parents=True)
    assert [p.name for p in files.list_checkpoints(tmp_path)] == ["step_000003", "step_000020", "step_1000000"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_alone(tmp_path, monkeypatch):
    (tmp_path / "ptx.jsonl").write_text(json.dumps(ROWS[0]))
    with ppo(tmp_path / "run", False, checkpoint_every=50, ptx_coef=0.0) as trainer:
        trainer.save_checkpoint()

        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        trainer.done_steps = 1
        with pytest.raises(RunError, match="cannot be written \\(No space left on device\\)"):
            trainer.save_checkpoint()
        assert sorted(p.name for p in files.checkpoints_dir(trainer.dir).iterdir()) == ["latest", "step_000000"]


if __name__ == "__main__":
    resume(sys.argv[1:])
