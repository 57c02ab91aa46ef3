"""A plan that is written before a run has the peaks that torch's profiler records in the run.

The runs are PPO on CPU ranks through the trainer, in configurations of different mode, layout and precision that are
drawn by a seed. The profiler records every allocation of torch, and knows nothing of the rehearsal.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from icegrt.commands import plan
from icegrt.config import PPOConfig
from icegrt.distributed.megatron import load_megatron
from icegrt.ppo.trainer import PPOTrainer
from icegrt.rollout import engine
from tests.helpers import stage_cases
from tests.helpers.profiles import peak_beside_gloo, released_by_gloo
from tests.helpers.ranks import launch

SEED, CONFIGURATIONS = 20, 10
MODEL = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 8}
KEYS = (
    "ppo.prompts_per_iteration=8",
    "ppo.samples_per_prompt=4",
    "ppo.sampling.max_new_tokens=24",
    "ppo.rollout.token_budget=64",
    "ppo.checkpoint_every=9",
    "ppo.iterations=3",
    "ppo.run.checkpoint_in_background=false",
)
ROOT = Path(__file__).resolve().parents[2]
# Ranks, and the keys of a layout.
LAYOUTS = {
    "one": (1, ()),
    "dp2": (2, ()),
    "tp2": (2, ("ppo.parallel.tensor=2",)),
    "tp2, sequence parallel": (2, ("ppo.parallel.tensor=2", "ppo.parallel.sequence_parallel=true")),
    "pp2": (2, ("ppo.parallel.pipeline=2",)),
}
CHOICES = {
    "offload.roles": ("none", "optimizer", "all"),
    "run.recompute": ("none", "selective", "full"),
    "run.dtype": ("fp32", "bf16"),
    "token_budget": (96, 192, 320),
    "minibatch_by": ("response", "prompt"),
    "minibatches": (1, 2),
}


# A run of more than 1 GiB: 34 million parameters in fp32, 40 bytes each over four roles.
LARGE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
LARGE_KEYS = ("ppo.iterations=2", "ppo.ppo_epochs=1", "ppo.minibatches=1", "ppo.checkpoint_every=9")
# glibc keeps blocks below a threshold that grows; this one stays, so that what is freed leaves the process.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def drawn():
    """Return the configurations: name of the layout, and keys. Every layout is there twice."""
    generator = random.Random(SEED)
    layouts = [*LAYOUTS] * (CONFIGURATIONS // len(LAYOUTS))
    return [
        (layout, tuple(f"ppo.{key}={generator.choice(values)}" for key, values in CHOICES.items()))
        for layout in layouts
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Prompts of one length: how sequences are packed does not depend on the order in which a run draws them."""
    home = stage_cases.make_home(tmp_path_factory.mktemp("planned"), **MODEL)
    stage_cases.write_jsonl(home.prompts, [{"prompt": letter * 12} for letter in "abcdefgh"])
    return home


def profiled_rank(config, folder):
    """Run two iterations, and write the peak of this rank's allocations."""
    load_megatron()  # as in a process in which other tests have run
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    # No response ends early: lengths are those of the plan.
    with mock.patch.object(engine, "stop_ids", lambda *args, **options: [10**6]), released_by_gloo():
        profiler.start()
        with PPOTrainer(config) as trainer:
            steps = iter(trainer)
            for _ in range(2):
                next(steps)
            profiler.stop()  # before the checkpoint at the end, which is not planned
            (folder / f"peak_{trainer.cluster.rank}").write_text(str(peak_beside_gloo(profiler)))


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("layout", "keys"), drawn())
def test_planned_peaks_are_those_of_the_run(home, tmp_path, layout, keys):
    ranks, layout_keys = LAYOUTS[layout]
    overrides = stage_cases.ppo_keys(home, tmp_path / "run", *KEYS, *layout_keys, *keys)
    plan_file = tmp_path / "plan.json"
    arguments = ["--gpus", str(ranks), "--cpu", "--no-search", "--prompts", home.prompts, "--out", str(plan_file)]
    launch(1, plan.main, [*overrides, *arguments])  # a process of its own: autograd's threads do not survive a fork
    config = PPOConfig.load(None, [*overrides, f"ppo.memory_plan={plan_file}"])
    launch(ranks, profiled_rank, config, tmp_path)
    planned = {rank["rank"]: rank["device_bytes"] for rank in json.loads(plan_file.read_text())["ranks"]}
    measured = {rank: int((tmp_path / f"peak_{rank}").read_text()) for rank in planned}
    assert planned == {rank: pytest.approx(peak, rel=0.05) for rank, peak in measured.items()}
    log = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert log["planned"] == json.loads(plan_file.read_text())["peaks"] and log["iterations"] == 2
    assert set(log["measured"]) == set(log["planned"]) | {"plan"}


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["none", "optimizer"])
def test_planned_peak_is_the_resident_memory_of_a_large_run(tmp_path, mode):
    home = stage_cases.make_home(tmp_path / "home", **LARGE)
    plan_file = tmp_path / "plan.json"
    overrides = stage_cases.ppo_keys(home, tmp_path / "run", *LARGE_KEYS, f"ppo.offload.roles={mode}")
    arguments = ["--gpus", "1", "--cpu", "--no-search", "--prompts", home.prompts, "--out", str(plan_file)]
    launch(1, plan.main, [*overrides, *arguments])
    script = [sys.executable, "-W", "ignore", "-m", "tests.helpers.planned_run", str(tmp_path / "tiny")]
    command = [*script, *overrides, f"ppo.memory_plan={plan_file}"]
    process = subprocess.run(
        command, cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=500
    )
    assert process.returncode == 0, process.stderr
    log = json.loads((tmp_path / "run" / "memory.json").read_text())
    (rank,) = json.loads(plan_file.read_text())["ranks"]
    # What is offloaded is in the memory of the process, too.
    host = rank["phases"]["update: actor"]["host"]["by_category"].get("offloaded state", 0)
    planned = log["planned"]["update"] + host
    assert planned > 1 << 30
    assert log["measured"]["update"] == pytest.approx(planned, rel=0.15)
