"""Killed twenty times from outside, at seeded instants of the clock, a run ends with the bits of an undisturbed one.

The run is `icegrt ppo` as users start it: one process, or two ranks under torchrun, which restarts them by itself. The
same command is given each time (`ppo.run.resume=auto`); nothing in it knows of the kills.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from icegrt.checkpoint import directory as files
from tests.helpers import stage_cases as cases

# KILLS=200 makes a long night of it.
KILLS, PARTIAL, ITERATIONS = int(os.environ.get("KILLS", "20")), 5, 80
TIMED = ("seconds", "per_second")
# Wide, so that a checkpoint takes a while to write, and shallow, so that an iteration takes none.
WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2}
RUN = [
    f"ppo.iterations={ITERATIONS}",
    "ppo.checkpoint_every=1",
    "ppo.eval_every=10",
    "ppo.eval_limit=2",
    "ppo.prompts_per_iteration=2",
    "ppo.samples_per_prompt=2",
    "ppo.minibatches=1",
    "ppo.ppo_epochs=1",
    "ppo.sampling.max_new_tokens=4",
    "ppo.kl_control=adaptive",
    "ppo.kl_horizon_responses=100",
    "ppo.score_shift=true",
    "ppo.run.resume=auto",
    "ppo.run.checkpoint_in_background=true",
]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "99"]
LAUNCHED = {
    "one process": ([], []),
    "two ranks": (TORCHRUN, ["ppo.parallel.tensor=2"]),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return cases.make_home(tmp_path_factory.mktemp("home"), **WIDE)


class Process:
    """The command, running; what it has started goes with it when it is killed."""

    def __init__(self, command, log):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ICEGRT_QUIET": "1"}
        with open(log, "ab") as out:
            self.process = subprocess.Popen([sys.executable, *command], env=environment, stdout=out, stderr=out)

    def ranks(self):
        """The processes that run icegrt's ranks: torchrun's children, or this one."""
        return [pid for pid in children(self.process.pid) if b"icegrt" in command_line(pid)] or [self.process.pid]

    def kill_one(self, draw):
        """One rank; torchrun is left to see to it."""
        os.kill(draw.choice(sorted(self.ranks())), signal.SIGKILL)

    def kill_all(self):
        """torchrun, then every rank."""
        ranks = self.ranks()
        self.process.kill()
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        while any(b"icegrt" in command_line(pid) for pid in ranks):
            time.sleep(0.01)

    def ended(self):
        return self.process.poll() is not None


def children(parent):
    pids = []
    for process_folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if int((process_folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                pids.append(int(process_folder.name))
    return pids


def command_line(pid):
    """Of a process that runs; one that is dead has none."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def wait_until(condition, process, seconds):
    """Looks every few milliseconds; gives up when the process has ended or after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not process.ended():
        if condition():
            return True
        time.sleep(0.003)
    return False


def steps_logged(run):
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def half_written(run):
    """A checkpoint that has files and no name yet."""
    folder = files.checkpoints_dir(run)
    return [p for p in folder.glob("*.writing") if any(p.rglob("*.distcp"))] if folder.is_dir() else []


def killed_again_and_again(command, run, log, draw):
    """Runs to the end through KILLS kills. Returns how many of them met a half-written checkpoint."""
    partial, process = 0, Process(command, log)
    for kill in range(KILLS):
        if process.ended():
            process = Process(command, log)
        logged = steps_logged(run)
        if kill % 7 == 3:  # while it starts
            time.sleep(draw.uniform(0.5, 8))
        else:
            assert wait_until(lambda logged=logged: steps_logged(run) > logged, process, 240), Path(log).read_text()[
                -3000:
            ]
            if kill % 2:
                wait_until(lambda: half_written(run), process, 20)
            time.sleep(draw.uniform(0, 0.06 if kill % 2 else 0.6))
        if kill % 3 == 1 and len(process.ranks()) > 1:
            process.kill_one(draw)
        else:
            process.kill_all()
        partial += bool(half_written(run))
    if process.ended():
        process = Process(command, log)
    assert process.process.wait(600) == 0, Path(log).read_text()[-3000:]
    return partial


def outcome(run):
    """All that a run leaves behind which is not about time."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rollouts = {p.name: p.read_bytes() for p in sorted((run / "rollouts").iterdir())}
    last = files.list_checkpoints(run)[-1]
    state = files.read_state(last)
    del state["rng"]  # Python seeds its generators anew in every process, and nothing here draws from them
    assert files.verify(last) == [] and (last.parent / "latest").read_text().strip() == last.name
    return {
        "rows": [{k: v for k, v in row.items() if not any(t in k for t in TIMED)} for row in rows],
        "rollouts": rollouts,
        "actor": (run / "model" / "model.safetensors").read_bytes(),
        "state": state,
        "tensors": {p.relative_to(last): p.read_bytes() for p in last.rglob("*.distcp")},
        "kept": [p.name for p in files.list_checkpoints(run)],
        "best": (last.parent / "best").read_text(),
    }


@pytest.mark.long
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("launched", LAUNCHED)
def test_a_run_killed_twenty_times_ends_as_if_nothing_had_happened(launched, home, tmp_path):
    launcher, keys = LAUNCHED[launched]

    def command(run):
        run_keys = cases.ppo_keys(home, run, f"ppo.eval_prompts={home.prompts}", *RUN, *keys)
        return [*launcher, "-m", "icegrt", "ppo", *run_keys]

    undisturbed = Process(command(tmp_path / "undisturbed"), tmp_path / "undisturbed.log")
    assert undisturbed.process.wait(900) == 0, (tmp_path / "undisturbed.log").read_text()[-3000:]
    killed = tmp_path / "killed"
    partial = killed_again_and_again(command(killed), killed, tmp_path / "killed.log", random.Random(launched))
    killed_outcome, expected_outcome = outcome(killed), outcome(tmp_path / "undisturbed")
    for part, expected in expected_outcome.items():
        assert killed_outcome[part] == expected, part
    assert len(killed_outcome["rows"]) == ITERATIONS + 1 and len(killed_outcome["rollouts"]) == ITERATIONS
    assert partial >= PARTIAL, f"only {partial} of {KILLS} kills met a half-written checkpoint"
    assert not list(files.checkpoints_dir(killed).glob("*.*")), "something was left over"
