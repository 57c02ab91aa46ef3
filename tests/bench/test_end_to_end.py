"""The end-to-end bench: its processes, its workloads, and the operations that it counts."""

import json
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.bench_ppo import MODES, providers
from bench.end_to_end.flops import useful_flops
from bench.end_to_end.protocol import Worker, WorkerError
from bench.end_to_end.recipe import ppo_config
from bench.end_to_end.workloads import RECIPE, WORKLOADS, Workload
from icegrt import PPOConfig

SMALL = Workload("small", layers=2, width=32, mlp=48, heads=4, kv_heads=2, vocab=64, prompts=3, prompt_tokens=(2, 5))
FAKE = """
from bench.end_to_end.protocol import private_stdout, serve
out, calls = private_stdout(), []
print("a library prints")
def step():
    calls.append(1)
    if len(calls) == 4:
        raise SystemExit(3)
    print("and again")
    return {"phases": {"work": len(calls)}}
serve(step, out)
"""


@pytest.fixture
def worker(tmp_path):
    (tmp_path / "fake_worker.py").write_text(FAKE)
    (tmp_path / "python").write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path / 'fake_worker.py'}\n")
    (tmp_path / "python").chmod(0o755)
    made = Worker("fake", str(tmp_path / "python"), "none", [], 1, tmp_path / "log")
    yield made
    made.close()


def test_a_worker_runs_an_iteration_per_request_and_its_libraries_print_elsewhere(worker, tmp_path):
    worker.wait_until_ready()
    runs = [worker.step(), worker.step()]
    assert [r["phases"] for r in runs] == [{"work": 2}, {"work": 3}]  # the first one was the warm-up
    assert all(r["seconds"] > 0 and r["peak_bytes"] > 1e6 for r in runs)
    assert "a library prints" in (tmp_path / "log").read_text()


def test_a_worker_that_ends_is_an_error_with_its_status(worker):
    worker.wait_until_ready()
    worker.step(), worker.step()
    with pytest.raises(WorkerError, match="fake ended with status 3"):
        worker.step()


def test_the_counted_operations_are_those_of_the_models():
    tokens = torch.randint(2, SMALL.vocab, (1, 11))
    counted = {}
    for name, model in (("lm", SMALL.actor()), ("scalar", SMALL.reward_model())):
        with FlopCounterMode(display=False) as counter:
            model.model(tokens)
        counted[name] = sum(counter.get_flop_counts()["Global"][op] for op in counter.get_flop_counts()["Global"]
                            if op in (torch.ops.aten.mm, torch.ops.aten.addmm))  # fmt: skip
    head = 2 * SMALL.width * SMALL.vocab * 4
    assert counted["lm"] == counted["scalar"] > 0
    assert useful_flops(SMALL, "score", 11, 4) == 4 * counted["lm"] + 2 * head
    assert useful_flops(SMALL, "update", 11, 4) == 3 * (2 * counted["lm"] + head)


@pytest.mark.parametrize("name", WORKLOADS)
def test_prompts_hold_no_token_that_ends_an_answer(name):
    workload = WORKLOADS[name]
    prompts = workload.prompt_ids()
    assert len(prompts) == workload.prompts and prompts == workload.prompt_ids()
    assert not {*workload.stop_ids} & {token for prompt in prompts for token in prompt}
    assert {*map(len, prompts)} <= {*range(workload.prompt_tokens[0], workload.prompt_tokens[1] + 1)}


def test_every_mode_is_a_configuration_of_the_same_recipe(tmp_path):
    workload = WORKLOADS["8-samples"]
    ppo_config(workload, "run").save(tmp_path / "base.yaml")
    for keys in MODES.values():
        config = PPOConfig.load(tmp_path / "base.yaml", list(keys))
        assert (config.kl_coef, config.lam, config.optimizer.lr) == (RECIPE["kl_coef"], RECIPE["lam"], RECIPE["lr"])
        assert (config.ppo_epochs, config.minibatches) == (1, 1)


def test_peers_run_at_four_batch_sizes():
    made = providers(WORKLOADS["long-tail"], "fp32", ["reference", "TRL"])
    for family in ("reference", "reference by length", "TRL"):
        assert len([p for p in made if p.family == family]) >= 4
    assert json.dumps([p.arguments for p in made])
