"""What the examples share: stages run once and resume, settings are kept, ranks see their numbers."""

import sys
from pathlib import Path

import numpy as np
import pytest

from icegrt.config import PPOConfig
from icegrt.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from ad_moderation import demo
from ad_moderation.demo import RECIPE, Demo, ppo_changes
from staged_run import assessment, stages
from staged_run.launch import launch
from staged_run.overrides import read_overrides


class TwoStages(stages.StagedRun):
    STAGES = ("first", "second")
    RANK_0_STAGES = ("second",)
    SECTIONS = ("ppo",)

    def first(self):
        self.calls.append("first")

    def second(self):
        self.calls.append("second")
        if self.fails:
            raise KeyboardInterrupt


def two_stages(out, fails=False, seed=0, overrides=()):
    run = TwoStages(out, seed, list(overrides))
    run.calls, run.fails = [], fails
    return run


def test_a_run_resumes_with_the_stage_that_did_not_finish(tmp_path):
    interrupted = two_stages(tmp_path / "out", fails=True)
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    assert interrupted.calls == ["first", "second"]
    for calls in (["second"], []):
        resumed = two_stages(tmp_path / "out")
        resumed.run()
        assert resumed.calls == calls


@pytest.mark.parametrize("other", [{"seed": 1}, {"overrides": ["ppo.kl_coef=0"]}])
def test_a_folder_with_other_settings_is_refused(tmp_path, other):
    two_stages(tmp_path / "out")
    with pytest.raises(UserError, match="other settings"):
        two_stages(tmp_path / "out", **other)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="not a demo's folder"):
        two_stages(tmp_path)


def test_a_file_that_a_finished_stage_did_not_leave_is_named_with_the_remedy(tmp_path):
    class Reader(TwoStages):
        def second(self):
            self.path.read_text(encoding="utf-8")

    def reader(path):
        run = Reader(tmp_path / "out", 0, [])
        run.calls, run.path = [], path
        return run

    missing = tmp_path / "out" / "data" / "rows.jsonl"
    # The first stage runs in the same process, so that no other version is to blame.
    with pytest.raises(FileNotFoundError):
        reader(missing).run()
    with pytest.raises(UserError, match=r"stage second: .*rows\.jsonl is missing, .* before: first\. .*Delete"):
        reader(missing).run()
    # A file elsewhere is not a stage's.
    with pytest.raises(FileNotFoundError):
        reader(tmp_path / "elsewhere.txt").run()


def test_an_override_of_another_section_is_a_usage_error(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path / "out"), "sft.epochs=1"])
    with pytest.raises(SystemExit):
        stages.main(TwoStages, "", "unused")
    assert "a section of ppo, got 'sft.epochs=1'" in capsys.readouterr().err


def test_overrides_of_the_command_line_come_after_the_recipe_of_an_option(tmp_path):
    demo = Demo(tmp_path / "lora", 0, ["ppo.optimizer.lr=1e-5", "sft.epochs=1"], sharing="lora")
    overrides = demo.run_overrides("ppo")
    assert not any(override.startswith("sft.") for override in overrides)
    changes = ppo_changes("lora")
    config = PPOConfig.load(RECIPE, [*changes, *overrides])  # the command line has the last word
    assert config.sharing == "lora" and config.optimizer.lr == 1e-5 != PPOConfig.load(RECIPE, changes).optimizer.lr
    assert Demo(tmp_path / "full", 0, [], sharing="full").overrides_of("ppo") == []


@pytest.mark.parametrize("sharing", ["full", "lora"])
@pytest.mark.parametrize(
    ("slowdown", "overrides", "dtype"),
    [(0.4, [], "bf16"), (20.0, [], "fp32"), (None, [], "fp32"), (0.4, ["ppo.run.dtype=fp32"], "fp32")],
    ids=["faster", "slower", "an older version prepared it", "the command line decides"],
)
def test_ppo_of_the_demo_has_the_type_that_prepare_chose(tmp_path, monkeypatch, sharing, slowdown, overrides, dtype):
    configs = []

    def stop(config):
        configs.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(demo, "prepare", lambda data, seed: data.mkdir())
    monkeypatch.setattr(demo, "PPOTrainer", stop)
    run = Demo(tmp_path / "out", 0, overrides, sharing=sharing)
    if slowdown is not None:
        monkeypatch.setattr(stages, "bf16_slowdown", lambda: slowdown)
        run.prepare()
        monkeypatch.setattr(stages, "bf16_slowdown", lambda: 1 / slowdown)  # a resumed run does not measure again
    with pytest.raises(KeyboardInterrupt):
        run.ppo()
    assert (configs[0].run.dtype, configs[0].sharing) == (dtype, sharing)


def test_every_rank_is_started_and_a_failure_is_the_result(tmp_path):
    write = "import os, pathlib; r = os.environ['RANK']; pathlib.Path(r).write_text(os.environ['WORLD_SIZE'])"
    code = f"import os; os.chdir({str(tmp_path)!r}); {write}; raise SystemExit(3 if r == '1' else 0)"
    assert launch([sys.executable, "-S", "-c", code], 2) == 3
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "2", "1": "2"}


def test_scores_are_averaged_by_prompt_and_compared_by_prompt():
    document = {"prompt": [0, 0, 1, 1, 2, 2]}
    before = assessment.per_prompt([0, 1, 0, 0, 1, 1], document)
    assert before.tolist() == [0.5, 0.0, 1.0]
    figures = assessment.gain("task_score", before, before + 0.25)
    assert figures["task_score_before"] == 0.5 and figures["task_score_after"] == 0.75
    np.testing.assert_allclose(figures["task_score_gain_ci95"], [0.25, 0.25])
    rows = assessment.example_rows(30, 4, 5)
    assert [n for n, kind in rows if kind == "fixed"] == [0, 1, 2, 3]
    assert len({n for n, _ in rows}) == 9 and all(4 <= n < 30 for n, kind in rows if kind == "random")


def test_figures_and_examples_of_a_run_are_those_of_its_answers(tmp_path):
    def assessed(task, texts, tokens):
        answers = {
            "prompt": [0, 0, 1, 1],
            "task": task,
            "text": texts,
            "tokens": tokens,
            "truncated": [False] * 3 + [True],
        }
        return {"sampled": answers, "greedy": {"prompt": [0, 1], "task": task[::2], "text": texts[::2]}}

    before = assessed([0, 0, 1, 0], ["a b c d", "a b c d", "a b c d", "a b c d"], [2, 2, 4, 8])
    after = assessed([1, 1, 1, 0], ["a b c d", "e f g h", "i j k l", "m n o p"], [1, 1, 1, 1])
    gains = assessment.score_gains(before, after)
    assert gains["task_score_before"] == gains["heldout_reward_before"] == 0.25 and gains["task_score_after"] == 0.75
    assert (gains["greedy_task_score_before"], gains["greedy_task_score_after"]) == (0.5, 1.0)
    old, new = (
        assessment.answer_figures(*pair) for pair in (("before", before["sampled"]), ("after", after["sampled"]))
    )
    assert old["response_tokens_mean_before"] == 4.0 and old["truncated_fraction_before"] == 0.25
    assert old["distinct_fraction_before"] < new["distinct_fraction_after"] == 1.0
    (tmp_path / "summary.json").write_text('{"alarms": ["one"]}')
    steps = [{"response_tokens_per_second": x, "seconds_by_phase": {"rollout": x}} for x in (1.0, 5.0, 3.0)]
    figures = assessment.run_figures(steps, tmp_path)
    assert figures == {"response_tokens_per_second": 3.0, "seconds_by_phase": {"rollout": 9.0}, "alarms": ["one"]}
    rows = [{"prompt": "p0", "answer": "r0"}, {"prompt": "p1", "answer": "r1"}]
    first, second = assessment.greedy_examples(rows, before, after, fixed=1, drawn=1)
    assert (first["kind"], second["kind"], second["prompt"], second["reference"]) == ("fixed", "random", "p1", "r1")
    assert (first["before"], first["before_score"], second["after"], second["after_score"]) == (
        "a b c d",
        0,
        "i j k l",
        1,
    )


def test_the_keys_of_a_file_are_overrides_and_another_section_is_refused(tmp_path):
    path = tmp_path / "changes.yaml"
    path.write_text("ppo: {sharing: lora, optimizer: {lr: 8e-4}}", encoding="utf-8")
    assert read_overrides(path, "ppo") == ['ppo.sharing="lora"', "ppo.optimizer.lr=0.0008"]
    path.write_text("ppo:", encoding="utf-8")
    assert read_overrides(path, "ppo") == []
    for text, found in (("sft: {epochs: 1}", "got sft"), ("", "got none"), ("ppo: {}\nsft: {}", "got ppo, sft")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=f"expected the section ppo alone, {found}"):
            read_overrides(path, "ppo")
