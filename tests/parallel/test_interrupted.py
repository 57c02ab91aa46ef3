"""Interrupted as users do, under torchrun and alone: what was done is kept, and the next command finishes the run."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from icegrt.checkpoint import directory as files
from icegrt.metrics import read_metrics
from tests.helpers import stage_cases as cases

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCHERS = {"one process": [], "two ranks": TORCHRUN}
# Keys of each stage: a run that does not end by itself, and the length to which the next command shortens it.
STAGES = {
    "sft": (cases.sft_keys, ("sft.epochs=100000",), "sft.epochs=50"),
    "reward": (cases.reward_keys, ("reward.epochs=100000", "reward.patience=0"), "reward.epochs=50"),
    "ppo": (cases.ppo_keys, ("ppo.iterations=100000", "ppo.checkpoint_every=100000"), "ppo.iterations=40"),
}


def start(launched, *arguments):
    """Start the command in a process group of its own, as a terminal does."""
    return subprocess.Popen(
        [sys.executable, *LAUNCHERS[launched], "-m", "icegrt", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_steps(process, run, steps):
    path = run / "metrics.jsonl"
    while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < steps):
        time.sleep(0.01)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("launched", LAUNCHERS)
@pytest.mark.parametrize(("stage", "number"), [*((stage, signal.SIGINT) for stage in STAGES), ("ppo", signal.SIGHUP)])
def test_a_signal_from_the_terminal_saves_and_the_next_command_finishes(stage, launched, number, home, tmp_path):
    stage_keys, endless, shortened = STAGES[stage]
    run = tmp_path / "run"
    keys = stage_keys(home, run, *endless)
    process = start(launched, stage, *keys)
    wait_for_steps(process, run, 3)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=120)
    (checkpoint,) = files.list_checkpoints(run)[-1:]
    steps = files.read_state(checkpoint)["step"]
    assert [row.get("step", row.get("iteration")) for row in read_metrics(run)] == [*range(1, steps + 1)]
    assert f"{number.name}: saved after {steps} of " in out and out.rstrip().endswith("continue with --resume")
    assert err.count("saving after this step") == 1
    # torchrun itself ends with a traceback of its own; the ranks do not, and end with status 0.
    assert launched != "one process" or (process.returncode == 0 and "Traceback" not in err)
    assert "icegrt/" not in err
    finished = start(launched, stage, *keys, shortened, "--resume")
    out, err = finished.communicate(timeout=300)
    assert finished.returncode == 0 and f"resumed from {checkpoint}" in out, err
    assert (run / "model" / "model.safetensors").is_file()


SLOW = """
import time

def slow(samples):
    time.sleep(60 if len(samples) > 2 else 0)  # the probe before training has two samples
    return [0.5] * len(samples)
"""


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("launched", LAUNCHERS)
def test_a_second_ctrl_c_leaves_at_once_and_names_a_command_that_works(launched, home, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    run = tmp_path / "run"
    keys = cases.ppo_keys(home, run)
    process = start(launched, "ppo", *keys, f"ppo.reward_function={tmp_path / 'slow.py'}:slow")
    while process.poll() is None and not (run / "config.yaml").exists():
        time.sleep(0.01)
    time.sleep(1.0)  # beyond the set-up, into the first call of the function
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(1.2)  # later than a launcher's repetition of the first
        os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert "icegrt/" not in err, "a traceback of ours"
    if launched == "one process":
        assert process.returncode == 130 and "Traceback" not in err
        last = err.splitlines()[-1]
        assert last.startswith("interrupted; to continue") and last.endswith("ppo.run.resume=auto")
    finished = start(launched, "ppo", *keys, "ppo.run.resume=auto")
    _, err = finished.communicate(timeout=120)
    assert finished.returncode == 0, err


CRASH = """
def crash(samples):
    if len(samples) > 2:  # the probe before training has two samples
        raise KeyError("no such answer")
    return [0.5] * len(samples)
"""


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("launched", LAUNCHERS)
def test_a_crash_in_the_first_iteration_names_the_command_that_starts_again(launched, home, tmp_path):
    (tmp_path / "crash.py").write_text(CRASH)
    run = tmp_path / "run"
    keys = cases.ppo_keys(home, run)
    process = start(launched, "ppo", *keys, f"ppo.reward_function={tmp_path / 'crash.py'}:crash")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("no such answer") == 1 and "iteration 1" in err and "icegrt/" not in err
    assert "ppo.run.resume=auto" in err and not files.list_checkpoints(run)
    finished = start(launched, "ppo", *keys, "ppo.run.resume=auto")
    _, err = finished.communicate(timeout=120)
    assert finished.returncode == 0, err
