"""torchrun itself: what cannot work is refused by rank 0, and a rank's failure is told once while the others leave."""

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.helpers import stage_cases as stages

FAILING = """
import os
import time

def fails_on_rank_1(samples):
    if os.environ["RANK"] == "1":
        raise ValueError("the judge is out")
    return [0.0] * len(samples)


def fails_on_rank_1_whose_connections_do_not_close(samples):
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel = lambda: time.sleep(300)
    return fails_on_rank_1(samples)
"""

VIRTUAL = ["ppo.parallel.virtual_pipeline=2"]


def torchrun(*args, ranks=2, seconds=600):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ICEGRT_QUIET": "1"}
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "icegrt", *args]
    return subprocess.run([sys.executable, *run], env=environment, capture_output=True, text=True, timeout=seconds)


def exit_statuses(process):
    """Of the ranks, as torchrun's last report lists them; a signal is negative."""
    return [int(status) for status in re.findall(r"^ *exitcode *: (-?\d+) \(pid", process.stderr, re.MULTILINE)]


def stderr_lines(process, start):
    return [line for line in process.stderr.splitlines() if line.startswith(start)]


@pytest.mark.timeout(700)
@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["ppo.parallel.tensor=3"], "which tensor 3 x pipeline 1 (3 per model) does not divide"),
        pytest.param(["ppo.parallel.pipeline_split=[1,1,1]"], "3 entries for 1 stages", marks=pytest.mark.long),
        pytest.param(["ppo.parallel.pipeline=2", *VIRTUAL], "layers cannot be divided", marks=pytest.mark.long),
    ],
)
def test_a_layout_that_cannot_be_is_refused_by_rank_0_alone(keys, says, tmp_path):
    home = stages.make_home(tmp_path)
    process = torchrun("ppo", *stages.ppo_keys(home, tmp_path / "run", *keys))
    assert process.returncode != 0
    (line,) = stderr_lines(process, "error: ")
    assert says in line and "parallel." in line
    assert not stderr_lines(process, "[rank 1]")
    assert "Traceback (most recent call last)" not in process.stderr.split("error: ")[0]
    # A rank ends by itself, or torchrun ends it after the other. A thread in C++ would abort it (SIGABRT).
    statuses = exit_statuses(process)
    assert 2 in statuses and set(statuses) <= {2, -signal.SIGTERM}


@pytest.mark.timeout(700)
@pytest.mark.parametrize(
    ("function", "workers"),
    [
        ("fails_on_rank_1", 1),
        pytest.param("fails_on_rank_1_whose_connections_do_not_close", 0, marks=pytest.mark.long),
    ],
)
def test_a_failing_rank_speaks_once_and_the_others_leave(function, workers, tmp_path):
    home = stages.make_home(tmp_path)
    (tmp_path / "score.py").write_text(FAILING)
    keys = stages.ppo_keys(home, tmp_path / "run", f"ppo.reward_function={tmp_path / 'score.py'}:{function}")
    process = torchrun("ppo", *keys, f"ppo.reward.workers={workers}")  # 0: in the rank itself
    assert process.returncode != 0
    (line,) = stderr_lines(process, "[rank ") + stderr_lines(process, "error: ")
    assert line.startswith("[rank 1] error: ") and "the judge is out" in line
    # Rank 0 waited for rank 1's scores, and has nothing to say about how that ended.
    assert "Connection" not in process.stderr and "gloo" not in process.stderr.lower()
