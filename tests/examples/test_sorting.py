"""The sorting example: parts without overlap, the reward, curves that resume, the whole run."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from icegrt import PPOConfig, SFTConfig
from icegrt.config.loader import as_dict
from icegrt.errors import UserError
from icegrt.ppo.setup import check_config
from icegrt.utils.values import flatten

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
from sorting import compare, curve, digits, outcome, run  # noqa: E402
from sorting.reward import exact_match  # noqa: E402

SIZES = {"sft": 64, "prompts": 64, "validation": 16, "test": 16}
SETTINGS = (
    "sft.epochs=2",
    "sft.batch_sequences=32",
    "ppo.iterations=2",
    "ppo.prompts_per_iteration=4",
    "ppo.samples_per_prompt=2",
    "ppo.minibatches=2",
    "ppo.eval_every=1",
    "ppo.checkpoint_every=1",
)


# ---- rows


@pytest.fixture(scope="module")
def rows():
    return digits.build_rows(digits.SIZES, seed=0)


def answers(rows, part):
    return {row["response"] if part == "sft" else row["answer"] for row in rows[part]}


def test_no_answer_and_no_prompt_occurs_in_two_parts(rows):
    for part in rows:
        for other in set(rows) - {part}:
            assert not answers(rows, part) & answers(rows, other)
    prompts = [row["prompt"] for part in rows.values() for row in part]
    assert len(prompts) == len(set(prompts))


def test_every_part_has_its_size_and_its_columns(rows):
    assert {part: len(part_rows) for part, part_rows in rows.items()} == digits.SIZES
    for part, part_rows in rows.items():
        column = "response" if part == "sft" else "answer"
        for row in part_rows:
            assert set(row) == {"prompt", column}
            assert len(row["prompt"]) == digits.DIGITS + 1 and row["prompt"].endswith("=")
            assert row[column] == "".join(sorted(row["prompt"][:-1]))


def test_the_seed_decides_rows_and_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "SIZES", SIZES)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        digits.prepare(tmp_path / name, seed)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) >= 4 + 3
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    for file in ("test.jsonl", "actor_init/model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes()


def test_a_character_is_a_token_and_the_end_is_no_padding():
    tokenizer = digits.build_tokenizer()
    ids = tokenizer("90417=").input_ids
    assert len(ids) == 6 and tokenizer.decode(ids) == "90417="
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == digits.build_model(0).config.vocab_size


# ---- reward


@pytest.mark.parametrize(
    ("text", "finish_reason", "score"),
    [
        ("012458", "stop", 1.0),
        ("012458", "length", 0.0),
        ("012485", "stop", 0.0),
        ("01245", "stop", 0.0),
        ("0124588", "stop", 0.0),
        ("528041", "stop", 0.0),
        ("", "stop", 0.0),
    ],
)
def test_only_a_complete_answer_with_all_digits_in_order_is_right(text, finish_reason, score):
    assert exact_match([SimpleNamespace(text=text, finish_reason=finish_reason, row={"answer": "012458"})]) == [score]


# ---- curves


def test_curves_count_seconds_of_training_only(tmp_path):
    steps = [
        {"kind": "sft", "step": n, "epoch": 1.0, "loss": 1.0, "tokens": 10 * n, "tokens_per_second": 10.0,
         "lr": 0.1, "grad_norm": 1.0}
        for n in (1, 2, 4)
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps), encoding="utf-8")
    points = [{"step": 2, "exact_match": 0.25}, {"step": 4, "exact_match": 0.5}]
    (tmp_path / curve.FILE).write_text("".join(json.dumps(row) + "\n" for row in points), encoding="utf-8")
    assert curve.sft_curve(tmp_path) == curve.Curve([3.0, 7.0], [0.25, 0.5])
    assert curve.sft_curve(tmp_path).after(4.0).seconds == [7.0, 11.0]
    assert curve.sft_seconds_per_step(tmp_path) == 2.0


def test_a_resumed_sft_run_drops_later_points_of_its_curve(tmp_path, monkeypatch):
    monkeypatch.setattr(curve, "read_prompts", lambda path, trainer: [])
    monkeypatch.setattr(curve, "measure", lambda trainer, prompts: 0.75)
    trainer = SimpleNamespace(total_steps=5, dir=tmp_path)
    callback = curve.ExactMatchCurve(tmp_path / "none.jsonl", every=2)
    for step in (1, 2, 3, 4, 5, 4):
        callback.on_update(trainer, SimpleNamespace(step=step))
    points = [json.loads(line)["step"] for line in (tmp_path / curve.FILE).read_text().splitlines()]
    assert points == [2, 4]


# ---- settings and run


def test_settings_are_on_policy_and_from_the_reward_function_alone():
    config = PPOConfig.load(run.SETTINGS, ["ppo.actor=a", "ppo.prompts=p", "ppo.reward_function=r.py:f"])
    assert config.critic.init == "actor" and not config.reward_model and config.kl_coef == 0
    assert config.sampling.max_new_tokens == digits.DIGITS + 1 and config.sampling.temperature == 1
    # Every rank count that the example starts gets whole prompts.
    assert config.prompts_per_iteration % (config.minibatches * run.Sorting.MAX_RANKS) == 0
    assert SFTConfig.load(run.SETTINGS, ["sft.model=a"]).sharing == "full"


def test_the_short_run_is_plain_ppo_with_the_other_settings_of_the_run():
    settings, short = (dict(flatten(as_dict(PPOConfig.load(path)))) for path in (run.SETTINGS, run.SHORT))
    names = {name for name in settings if settings[name] != short[name]}
    paths = {"actor", "reward_function", "prompts", "eval_prompts", "run.dir"}
    aids = {"dynamic_sampling", "dynamic_sampling_max_rounds", "positive_nll_coef", "clip_high", "entropy_coef"}
    assert names == paths | aids | {"iterations", "eval_every", "checkpoint_every"}


@pytest.mark.parametrize("path", sorted(compare.OPTIONS.glob("*.yaml")), ids=lambda path: path.stem)
def test_an_option_is_a_valid_run_that_differs_from_the_baseline(path):
    option = compare.read_option(path)
    config = PPOConfig.load(run.SHORT, [*run.ppo_inputs(Path("out")), *option.overrides])
    check_config(config)
    baseline = PPOConfig.load(run.SHORT, run.ppo_inputs(Path("out")))
    assert (config != baseline) == (option.name != compare.BASELINE)


@pytest.mark.parametrize("text", ["ppo: {lam: 1.0}", "# a title\nsft: {epochs: 1}", "# a title\nlam: 1.0"])
def test_a_file_of_options_without_title_or_with_another_section_is_refused(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"expected a comment|expected the section ppo alone"):
        compare.read_option(path)


def test_an_unknown_option_is_refused():
    with pytest.raises(UserError, match="got 'advantage-none'"):
        compare.read_options(["advantage-none"])


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(digits, "SIZES", SIZES)
    for name in ("FIXED_EXAMPLES", "RANDOM_EXAMPLES"):
        monkeypatch.setattr(outcome, name, 2)


def test_the_run_resumes_and_writes_its_report(small, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = run.Sorting(out, 0, list(SETTINGS))
    monkeypatch.setattr(first, "sft_alone", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        first.run()
    ppo_finished = (out / "stages" / "ppo.json").read_bytes()
    run.Sorting(out, 0, list(SETTINGS)).run()
    assert (out / "stages" / "ppo.json").read_bytes() == ppo_finished
    assert sorted(path.stem for path in (out / "stages").iterdir()) == sorted(run.Sorting.STAGES)

    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    for when in ("before", "after", "sft_alone"):
        assert 0 <= report[f"exact_match_{when}"] <= 1
    assert report["seconds_sft"] > 0 and report["seconds_ppo"] > 0
    assert report["ppo"]["iterations"] == 2 and report["ppo"]["test_prompts"] == SIZES["test"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "SFT alone, continued" in page and "seconds of training" in page
    assert (out / "learning.png").read_bytes().startswith(b"\x89PNG")
    curves = outcome.Outcome(out).curves
    assert len(curves["PPO"].seconds) == 3  # before training and after each iteration
    assert curves["PPO"].seconds[0] == curves["SFT"].seconds[-1]

    # Options start from this run, are trained once each, and share a page.
    overrides = [setting for setting in SETTINGS if setting.startswith("ppo.")]
    options = compare.read_options(["advantage-rloo"])
    for _ in range(2):
        compare.train(options, out, tmp_path / "options", overrides)
        metrics = (tmp_path / "options" / "advantage-rloo" / "metrics.jsonl").stat().st_mtime_ns
    page = compare.write_page(options, tmp_path / "options").read_text(encoding="utf-8")
    assert [option.name for option in options] == [compare.BASELINE, "advantage-rloo"]
    assert "Exact match: advantage" in page and "no critic" in page
    markdown = compare.write_markdown(options, tmp_path / "options", tmp_path / "docs" / "options.md")
    text = markdown.read_text(encoding="utf-8")
    rloo = curve.evaluations(tmp_path / "options" / "advantage-rloo")
    ends = " | ".join(f"{rloo[n]['function_score_mean']:.3f}" for n in (0, -1))
    assert text.count("| `baseline` |") == 1 and f"| `advantage-rloo` | {options[1].title} | {ends} |" in text
    assert "](options.png)" in text and f"{SIZES['validation']} validation prompts" in text and "2 iterations" in text
    assert (tmp_path / "docs" / "options.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "options" / "advantage-rloo" / "metrics.jsonl").stat().st_mtime_ns == metrics
    rloo = PPOConfig.load(tmp_path / "options" / "advantage-rloo" / "config.yaml")
    assert rloo.advantage == "rloo" and rloo.iterations == 2 and rloo.run.seed == 0


@pytest.mark.long
def test_a_short_training_raises_exact_match(tmp_path):
    settings = ["ppo.iterations=30", "ppo.eval_every=10"]
    run.Sorting(tmp_path / "out", 7, settings).run()
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["exact_match_before"] < 0.2
    assert report["ppo"]["task_score_gain_ci95"][0] > 0.1
