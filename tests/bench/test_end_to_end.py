"""The end-to-end bench: its processes, its workloads, and the operations that it counts."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from bench import bench_ppo, harness
from bench.end_to_end.flops import ATTENTION, PRODUCTS
from bench.end_to_end.protocol import RUN_FOLDER, Worker, WorkerError, try_settings
from bench.end_to_end.providers import MODES, PEERS, Provider, providers
from bench.end_to_end.ranks import RankWorkers, merged
from bench.end_to_end.recipe import ppo_config
from bench.end_to_end.workloads import RECIPE, WORKLOADS, workload_of
from icegrt import PPOConfig

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
serve(step, out, lambda: {"flops": len(calls)})
"""
FAKE_LARGE = """
from bench.end_to_end.protocol import private_stdout, serve
out = private_stdout()
bytearray(300 << 20)
serve(lambda: {}, out, settings={"large": 2.0, "small": 1.0})
"""
# It ends after as many iterations as its last argument says.
FAKE_SHORT = """
import sys
from bench.end_to_end.protocol import private_stdout, serve
out, last, calls = private_stdout(), int(sys.argv[-1]), []
def step():
    calls.append(1)
    if len(calls) > last:
        raise SystemExit(3)
    return {"phases": {"rollout": 1.0}, "tokens": 10, "answer_tokens": 5}
serve(step, out, settings={f"{last} rows": 1.0})
"""
FAKE_RANK = """
import json, os, sys
from bench.end_to_end.protocol import RUN_FOLDER, private_stdout, serve
out, rank = private_stdout(), int(os.environ["RANK"])
names = ("RANK", "WORLD_SIZE", "MASTER_PORT", "OMP_NUM_THREADS", RUN_FOLDER)
print(json.dumps({name: os.environ[name] for name in names}), flush=True)
flops = {"rollout": {"products": 1 + rank, "attention": 10 + 10 * rank}}
serve(lambda: {"busy_phases": {"rollout": 1.0 + rank}}, out, lambda: {"flops": flops})
"""


@pytest.fixture
def fake_python(tmp_path):
    """Return a function that makes an interpreter which runs one program, whatever its arguments."""

    def make(program):
        (tmp_path / "fake_worker.py").write_text(program)
        (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "fake_worker.py"} "$@"\n')
        (tmp_path / "python").chmod(0o755)
        return str(tmp_path / "python")

    return make


@pytest.fixture
def worker(fake_python, tmp_path):
    made = Worker("fake", fake_python(FAKE), "none", [], 1, tmp_path / "log")
    yield made
    made.close()


def test_a_worker_runs_an_iteration_per_request_and_its_libraries_print_elsewhere(worker, tmp_path):
    worker.wait_until_ready()
    runs = [worker.step(), worker.step()]
    assert worker.count() == {"flops": 3}  # which ran no iteration of its own here
    assert [r["phases"] for r in runs] == [{"work": 2}, {"work": 3}]  # the first one was the warm-up
    assert all(r["seconds"] > 0 and r["peak_bytes"] > 1e6 for r in runs)
    assert "a library prints" in (tmp_path / "log").read_text()


def test_a_worker_that_ends_is_an_error_with_its_status(worker):
    worker.wait_until_ready()
    worker.step(), worker.step()
    with pytest.raises(WorkerError, match="fake ended with status 3"):
        worker.step()


@pytest.mark.parametrize("name", WORKLOADS)
def test_prompts_hold_no_token_that_ends_an_answer(name):
    workload = WORKLOADS[name]
    prompts = workload.prompt_ids()
    assert len(prompts) == workload.prompts and prompts == workload.prompt_ids()
    assert not {*workload.stop_ids} & {token for prompt in prompts for token in prompt}
    assert {*map(len, prompts)} <= {*range(workload.prompt_tokens[0], workload.prompt_tokens[1] + 1)}


def test_a_workload_is_named_with_other_sizes():
    changed = workload_of("135M,prompts=2,prompt_tokens=4:8,answer_tokens=3")
    assert (changed.layers, changed.width, changed.prompts, changed.samples) == (30, 576, 2, 2)
    assert (changed.prompt_tokens, changed.context) == ((4, 8), 11)
    assert workload_of("uniform") == WORKLOADS["uniform"]
    with pytest.raises(ValueError, match="'unifrom' is no workload; there are uniform, long-tail"):
        workload_of("unifrom")
    with pytest.raises(ValueError, match="'rows' is no size of a workload; there are answer_tokens"):
        workload_of("uniform,rows=2")


def test_every_mode_is_a_configuration_of_the_same_recipe(tmp_path):
    workload = WORKLOADS["8-samples"]
    ppo_config(workload, "run").save(tmp_path / "base.yaml")
    for keys in MODES.values():
        config = PPOConfig.load(tmp_path / "base.yaml", list(keys))
        assert (config.kl_coef, config.lam, config.optimizer.lr) == (RECIPE["kl_coef"], RECIPE["lam"], RECIPE["lr"])
        assert (config.ppo_epochs, config.minibatches) == (1, 1)


@pytest.mark.parametrize("name", WORKLOADS)
def test_peers_try_four_batch_sizes(name):
    workload = WORKLOADS[name]
    made = {p.name: p for p in providers(workload, "fp32", [*PEERS])}
    assert ("reference by length" in made) == bool(workload.stop_tokens)
    for provider in ("reference", "TRL"):
        rows = [int(one) for one in made[provider].arguments[2:]]
        assert len(rows) == 4 and all(workload.episodes % n == 0 for n in rows)
    assert len(made["transformers continuous batching"].arguments[2:]) == 4


def test_a_provider_is_named_after_its_fastest_setting():
    provider = Provider("reference", "reference", "python", "module", ())
    assert provider.at({"8 rows": 2.0, "16 rows": 1.0, "32 rows": 3.0}).name == "reference, 16 rows"
    assert provider.at({}) is provider


def test_settings_are_tried_after_a_warm_up():
    order = []

    def run(setting):
        order.append(setting)
        return {"phases": {"rollout": len(order), "update": 0.5}}

    assert try_settings(["a", "b"], run) == {"a": 2.5, "b": 3.5}
    assert order == ["a", "a", "b"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is reset on Linux alone")
def test_the_peak_forgets_settings_that_were_tried(fake_python, tmp_path):
    worker = Worker("fake", fake_python(FAKE_LARGE), "none", [], 1, tmp_path / "log")
    try:
        assert worker.wait_until_ready() == {"large": 2.0, "small": 1.0}
        assert worker.step()["peak_bytes"] < 200 << 20
    finally:
        worker.close()


def test_ranks_meet_at_one_address_and_share_the_threads(fake_python, tmp_path):
    workers = RankWorkers("fake", fake_python(FAKE_RANK), "none", [], 4, tmp_path / "log", 2)
    try:
        assert workers.wait_until_ready() == {}
        figures = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
        assert sorted(one["RANK"] for one in figures) == ["0", "1"]
        assert {(one["WORLD_SIZE"], one["OMP_NUM_THREADS"]) for one in figures} == {("2", "2")}
        assert len({(one["MASTER_PORT"], one[RUN_FOLDER]) for one in figures}) == 1
        step, count = workers.step(), workers.count()
        assert step["slowest_over_fastest"] == {"rollout": 2.0} and step["seconds"] > 0
        assert count["flops"] == {"rollout": {PRODUCTS: 3, ATTENTION: 30}}
    finally:
        workers.close()


def test_figures_of_ranks_are_the_last_ones_times_and_the_sum_of_costs():
    ranks = [
        {
            "seconds": 2.0,
            "cpu_seconds": 1.0,
            "peak_bytes": 10,
            "tokens": 7,
            "busy_phases": {"score": 1.0, "update": 3.0},
        },
        {
            "seconds": 3.0,
            "cpu_seconds": 1.5,
            "peak_bytes": 20,
            "tokens": 7,
            "busy_phases": {"score": 2.0, "update": 2.0},
        },
    ]
    whole = merged(ranks)
    assert (whole["seconds"], whole["cpu_seconds"], whole["peak_bytes"], whole["tokens"]) == (3.0, 2.5, 30, 7)
    assert whole["slowest_over_fastest"] == {"score": 2.0, "update": 1.5}


def test_a_provider_that_ends_is_left_out_and_the_others_have_rows(fake_python, tmp_path, monkeypatch, capsys):
    ends, stays = fake_python(FAKE_SHORT), "bench.end_to_end.reference_worker"
    monkeypatch.setattr(bench_ppo, "peak_gflops", lambda dtype, threads: 1.0)
    monkeypatch.setattr("bench.end_to_end.figures.versions", lambda python, threads: "{}")
    made = [
        Provider("ends", "a", ends, stays, ("2",)),
        Provider("never starts", "b", "/bin/false", stays, ()),
        Provider("stays", "c", ends, stays, ("9",)),
    ]
    monkeypatch.setattr(bench_ppo, "providers", lambda *args: made)
    options = Namespace(peers=[], threads=1, only=None, rounds=3, log=tmp_path / "log")
    rows = bench_ppo.run(WORKLOADS["uniform"], "fp32", options)
    assert {row["provider"] for row in rows if row["metric"] == "time"} == {"stays, 9 rows"}
    tried = {row["provider"]: row["median"] for row in rows if row["metric"] == "warm-up iteration"}
    assert tried == {"ends, 2 rows": 1.0, "stays, 9 rows": 1.0}
    shown = capsys.readouterr().out
    assert "left out: never starts ended with status 1" in shown and "left out: ends ended with status 3" in shown


def test_the_options_name_providers():
    options = Namespace(peers=["reference"], threads=2, only=["icegrt", "reference", "TRL"])
    assert [p.name for p in bench_ppo.chosen(WORKLOADS["135M"], "fp32", options)] == ["icegrt", "reference"]


def test_rows_of_workloads_that_do_not_run_stay(tmp_path):
    path = tmp_path / "ppo.json"
    assert bench_ppo.rows_of_other_cases(path, bench_ppo.DEFAULT_CASES) == []
    path.write_text(json.dumps([{"case": case} for case in ("135M bf16", "uniform fp32", "uniform bf16")]))
    kept = bench_ppo.rows_of_other_cases(path, [(WORKLOADS["uniform"], "fp32")])
    assert [row["case"] for row in kept] == ["135M bf16", "uniform bf16"]
    assert all(set(row) == set(harness.KEYS) for row in kept)
