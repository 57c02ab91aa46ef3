"""`icegrt plan`: peaks, changes that make a run fit with their costs, and clear errors."""

import json

import pytest

from icegrt import cli
from icegrt.errors import UserError
from icegrt.rehearsal.phases import PHASES
from tests.helpers.rehearsals import write_model


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    model = write_model(folder / "model", hidden_size=128, intermediate_size=512)
    path = folder / "ppo.yaml"
    path.write_text(
        f"ppo:\n  actor: {model}\n  reward_model: {model}\n  prompts_per_iteration: 8\n  samples_per_prompt: 2\n"
        "  ppo_epochs: 1\n  minibatches: 1\n  token_budget: 512\n  rollout: {kv_memory: 1MB}\n"
        "  chunk_rows: 64\n  sampling: {max_new_tokens: 32}\n  run: {dtype: bf16}\n"
    )
    return path


def plan(*arguments):
    from icegrt.commands import plan

    plan.main([str(argument) for argument in arguments])


def test_a_plan_has_every_phase_of_every_kind_of_rank(config, capsys, tmp_path):
    out = tmp_path / "plan.json"
    layout = ["ppo.parallel.pipeline=2", "--gpus", 4, "--gpu-memory", "1GiB", "--prompt-tokens", 48]
    plan(config, *layout, "--out", out, "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert printed["fits"] and printed["proposals"] == [] and printed["rehearsed"] == 1
    assert (printed["memory_bytes"], printed["usable_bytes"]) == (1 << 30, int(0.94 * (1 << 30)))
    assert [rank["kind"] for rank in printed["ranks"]] == ["first stage", "last stage"]
    for rank in printed["ranks"]:
        assert tuple(rank["phases"]) == PHASES
        for phase in rank["phases"].values():
            assert sum(phase["device"]["by_category"].values()) == phase["device"]["bytes"] > 0
    assert printed["config"]["parallel"]["pipeline"] == 2
    assert set(printed["peaks"]) == {"rollout", "score", "shape", "update"}


def test_changes_that_make_it_fit_come_with_what_they_cost(config, capsys):
    arguments = [config, "--gpus", 2, "--prompt-tokens", 48, "--json", "--gpu-memory"]
    plan(*arguments, "1GB")
    need = json.loads(capsys.readouterr().out)["device_bytes"]
    plan(*arguments, f"{0.75 * need / 0.94:.0f}")
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert not report["fits"] and len(report["proposals"]) > 1
    assert "ppo.offload.roles=all" in captured.err and "does not fit" in captured.err
    for proposal in report["proposals"]:
        assert proposal["device_bytes"] <= report["usable_bytes"] < report["device_bytes"]
    costs = {key: p for p in report["proposals"] for key in p["keys"]}
    assert costs["ppo.offload.roles"]["extra"]["host_bytes"] > 0 == costs["ppo.offload.roles"]["extra"]["flops"]
    assert costs["ppo.parallel.tensor"]["extra"]["collective_bytes"] > 0
    seconds = [proposal["cost"]["seconds"] for proposal in report["proposals"]]
    assert seconds == sorted(seconds) and report["cost"]["seconds"] > 0


def test_the_tables_name_kinds_of_rank_and_categories(config, capsys):
    plan(config, "--gpus", 2, "--prompt-tokens", 48, "--gpu-memory", "1MB", "--no-search")
    text = capsys.readouterr().out
    for part in ("every rank (rank 0)", "update: critic", "optimizer state", "not measured", "does not fit"):
        assert part in text
    assert "no change that was tried makes it fit (configurations rehearsed: 1)" in text


def test_ranks_on_cpus_are_planned_too(config, capsys):
    plan(config, "--gpus", 2, "--prompt-tokens", 48, "--cpu", "--json", "ppo.run.dtype=fp32", "--no-search")
    assert json.loads(capsys.readouterr().out)["device_bytes"] > 1e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu-memory", "80GiB"], "--gpus"),
        (["--gpus", "2", "--gpu-memory", "much"], "--gpu-memory: expected a size such as 80GiB, got 'much'"),
        (["--gpus", "2", "--gpu-memory", "0.5"], "--gpu-memory: expected a size"),
        (["--gpus", "2", "--gpu", "h99"], "`h99` is neither"),
        (["--gpus", "3", "ppo.parallel.tensor=2"], "does not divide"),
        (["--gpus", "2", "ppo.actor=/nowhere"], "/nowhere"),
        (["--gpus", "2", "ppo.token_budget=16"], "ppo.token_budget is 16"),
    ],
)
def test_errors_name_the_argument(config, arguments, message):
    with pytest.raises(UserError, match=message):
        plan(config, *arguments)


def test_help(capsys):
    assert cli.main(["plan", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--gpu-memory" in text and "--out" in text
