"""`icegrt rehearse`: a report for every kind of rank, and clear errors."""

import json
import warnings

import pytest

from icegrt import cli
from icegrt.config import PPOConfig
from icegrt.errors import ConfigError, UserError
from icegrt.rehearsal.phases import PHASES
from icegrt.rehearsal.prompts import prompt_lengths
from tests.helpers import tiny_models as tiny
from tests.helpers.rehearsals import write_model


@pytest.fixture
def config(tmp_path):
    model = write_model(tmp_path / "model")
    path = tmp_path / "ppo.yaml"
    path.write_text(
        f"ppo:\n  actor: {model}\n  reward_model: {model}\n  prompts_per_iteration: 8\n  samples_per_prompt: 2\n"
        "  ppo_epochs: 1\n  minibatches: 1\n  token_budget: 1024\n  sampling: {max_new_tokens: 32}\n"
        "  parallel: {tensor: 2, pipeline: 4}\n  run: {dtype: bf16}\n"
    )
    return path


def rehearse(*arguments):
    from icegrt.commands import rehearse

    rehearse.main([str(argument) for argument in arguments])


def test_json_has_every_phase_of_every_kind_of_rank(config, capsys):
    rehearse(config, "--gpus", 16, "--gpu", "h100-80", "--prompt-tokens", "uniform:16:48", "--json")
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert [(rank["kind"], rank["rank"]) for rank in report["ranks"]] == [
        ("first stage", 0),
        ("middle stage", 4),
        ("last stage", 12),
    ]
    assert report["layout"] == {"tensor": 2, "pipeline": 4, "data": 2, "sequence_parallel": False}
    for rank in report["ranks"]:
        assert tuple(rank["phases"]) == PHASES and rank["fits"]
        for name, phase in rank["phases"].items():
            assert phase["launches"] > 0 and phase["peak_device_memory"]["bytes"] > 0, name
            assert phase["lower_bound"]["seconds"] > 0
        assert sum(rank["peak_device_memory"]["by_category"].values()) == rank["peak_device_memory"]["bytes"]
        used = {c["group"] for phase in rank["phases"].values() for c in phase["collectives"]}
        assert {g["name"] for g in rank["process_groups"] if g["used"]} == used
    assert "middle stage: inference" in captured.err and "nothing was measured" in report["kind"]


def test_the_tables_show_assumptions_and_no_measurement(config, capsys):
    rehearse(config, "ppo.parallel.pipeline=1", "--gpus", 4, "--gpu", "h200-141")
    text = capsys.readouterr().out
    for part in ("every rank (rank 0)", "update: critic", "fits", "assumptions", "nothing was measured", "NVIDIA H200"):
        assert part in text
    assert "measured" not in text.replace("nothing was measured", "")


def test_a_model_that_does_not_fit_is_said_not_to_fit(config, capsys, tmp_path):
    (tmp_path / "small.yaml").write_text("base: h100-80\nmemory_bytes: 1e6\n")
    rehearse(config, "ppo.chunk_rows=64", "--gpus", 8, "--gpu", tmp_path / "small.yaml")
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "12", "--gpu", "h100-80"], r"not a multiple of --gpus-per-node|does not divide"),
        (["--gpus", "4", "--gpu", "h100-80"], "does not divide"),
        (["--gpus", "8", "--gpu", "h99"], "`h99` is neither"),
        (["--gpu", "h100-80"], "--gpus"),
        (["--gpus", "8", "--gpu", "h100-80", "--prompt-tokens", "many"], "--prompt-tokens: expected a number"),
        (["--gpus", "8", "--gpu", "h100-80", "--prompt-tokens", "uniform:9:3"], "9 is above 3"),
        (["--gpus", "8", "--gpu", "h100-80", "--prompt-tokens", "1000"], "ppo.token_budget is 1024"),
        (["--gpus", "8", "--gpu", "h100-80", "--response-tokens", "64"], "64 is above ppo.sampling.max_new_tokens, 32"),
        (["--gpus", "8", "--gpu", "h100-80", "--decode-steps", "0"], "--decode-steps: expected 1 to"),
        (["ppo.parallel.virtual_pipeline=2", "--gpus", "8", "--gpu", "h100-80"], "virtual_pipeline"),
        (["ppo.actor=/nowhere", "--gpus", "8", "--gpu", "h100-80"], "/nowhere"),
        (["ppo.parallel.tensor=3", "--gpus", "24", "--gpu", "h100-80"], "8 attention heads cannot be divided"),
        (["--gpus", "8", "--gpus-per-node", "0", "--gpu", "h100-80"], "--gpus-per-node: expected 1 or more"),
        (
            ["--gpus", "8", "--gpu", "h100-80", "--prompts", "none.jsonl"],
            "the tokenizer cannot be loaded",
        ),
        (["--gpus", "8", "--gpu", "none.yaml"], "none.yaml: no such file"),
    ],
)
def test_errors_name_the_argument(config, arguments, message):
    with pytest.raises(UserError, match=message):
        rehearse(config, *arguments)


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ("bf16_flops: 1e15", "`fp32_flops` is missing"),
        ("base: h99", "base `h99` is not one of a100-80"),
        ("base: h100-80\nmemory: 1", "`memory` is not a figure"),
        ("base: h100-80\nmemory_bytes: much", "`memory_bytes` must be a number, got 'much'"),
        ("base: h100-80\nmemory_bytes: 0", "`memory_bytes` must be above 0"),
        ("base: [", "not valid YAML"),
        ("h100", "expected a mapping"),
    ],
)
def test_errors_of_figures_are_one_line(config, tmp_path, figures, message, capsys):
    (tmp_path / "gpu.yaml").write_text(figures)
    assert cli.main(["rehearse", str(config), "--gpus", "8", "--gpu", str(tmp_path / "gpu.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_prompts_of_a_file_give_their_lengths(config, tmp_path, capsys):
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    lengths = [9, 30, 17]
    rows = "".join(json.dumps({"prompt": "a" * length}) + "\n" for length in lengths)
    (tmp_path / "prompts.jsonl").write_text(rows)
    arguments = ["ppo.parallel.pipeline=1", "--gpus", 4, "--gpu", "h100-80", "--json", "--prompts"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rehearse(config, *arguments, tmp_path / "prompts.jsonl")
    report = json.loads(capsys.readouterr().out)
    (lengths_line,) = (line for line in report["assumptions"] if line.startswith("Lengths"))
    assert "prompts.jsonl, 12 to 33 tokens" in lengths_line
    # The chat template adds three tokens. The rows are repeated in order.
    expected = [lengths[index % 3] + 3 for index in range(8)]
    assert prompt_lengths(tmp_path / "prompts.jsonl", PPOConfig.load(str(config), []), 8) == expected
    with pytest.raises(UserError, match="--prompts and --prompt-tokens"):
        rehearse(config, *arguments, tmp_path / "prompts.jsonl", "--prompt-tokens", 4)


def test_help_and_two_files(config, capsys):
    assert cli.main(["rehearse", "--help"]) == 0
    assert "--gpus-per-node" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="two configuration files"):
        rehearse(config, config, "--gpus", 8, "--gpu", "h100-80")
