"""The recipe end to end on a tiny model: what each command writes, and what a run does when it goes on."""

import json
import math

import pytest
from safetensors.torch import load_file

import icegrt
from icegrt import cli
from icegrt.config import PPOConfig, RewardConfig, SFTConfig
from icegrt.errors import DataError
from icegrt.metrics import read_metrics, step_from_row
from icegrt.model.hf.score_statistics import saved_statistics
from icegrt.ppo.trainer import PPOTrainer
from icegrt.training.reward_model import RewardTrainer
from icegrt.training.reward_summary import surprises
from icegrt.training.sft import SFTTrainer
from tests.helpers import stage_cases as cases
from tests.helpers import tiny_models


def trainer(kind, config, keys, **options):
    return kind(config.load(None, keys), **options)


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def same_files(folder, expected_folder):
    names = cases.files_under(folder)
    assert names == cases.files_under(expected_folder)
    return all((folder / name).read_bytes() == (expected_folder / name).read_bytes() for name in names)


@pytest.fixture(scope="module")
def recipe(home, tmp_path_factory):
    """sft, sample, reward, ppo through the command line, each from what the one before has written."""
    out = tmp_path_factory.mktemp("recipe")
    assert cli.main(["sft", *cases.sft_keys(home, out / "sft")]) == 0
    sample = [f"sample.model={out}/sft", f"sample.prompts={home.prompts}", f"sample.out={out}/answers.jsonl"]
    sample += [f"sample.score_function={home.function}", "sample.sampling.max_new_tokens=8", "sample.seed=3"]
    assert cli.main(["sample", *sample]) == 0
    ranked = f"reward.data=[{{path: {out}/answers.jsonl}}]"
    model = f"reward.model={out}/sft/model"
    assert cli.main(["reward", *cases.reward_keys(home, out / "reward", model, ranked)]) == 0
    keys = [f"ppo.actor={out}/sft/model", f"ppo.reward_model={out}/reward/model", f"ppo.eval_prompts={home.prompts}"]
    assert cli.main(["ppo", *cases.ppo_keys(home, out / "ppo", *keys, "ppo.eval_limit=3")]) == 0
    return out


def test_sft_learns_and_writes_its_run(recipe):
    rows = [step_from_row(row) for row in read_metrics(recipe / "sft")]
    assert [row.step for row in rows] == [1, 2]
    assert summary(recipe / "sft")["heldout_loss_after"] < summary(recipe / "sft")["heldout_loss_before"]
    assert {"config.yaml", "metrics.jsonl", "model", "checkpoints", "tokenizer"} <= set(
        cases.files_under(recipe / "sft")
    )
    assert SFTConfig.load(recipe / "sft" / "config.yaml").run.dir == str(recipe / "sft")


def test_sample_writes_rows_ready_for_ranking(recipe):
    rows = cases.read_jsonl(recipe / "answers.jsonl")
    assert [row["prompt"] for row in rows] == cases.PROMPTS and [row["topic"] for row in rows] == list(range(8))
    for row in rows:
        assert [len(row[key]) for key in ("responses", "response_ids", "finish_reasons", "scores")] == [4] * 4
        for ids, text, reason, score in zip(
            row["response_ids"], row["responses"], row["finish_reasons"], row["scores"], strict=True
        ):
            assert 1 <= len(ids) <= 8 and (ids[-1] == tiny_models.EOS) == (reason == "stop")
            assert score == text.count("a") / len(ids)


def test_reward_keeps_its_statistics_beside_the_model(recipe):
    saved = json.loads((recipe / "reward" / "model" / "score_statistics.json").read_text())
    assert saved["after"]["count"] == 32 and saved["after"]["std"] > 0
    assert saved["before"] == {"count": 32, "mean": 0.0, "std": 0.0}  # a new head is zero
    figures = summary(recipe / "reward")
    assert figures["heldout_loss_before"] == pytest.approx(math.log(2))
    assert figures["heldout_pairs"] == 8 * 5 and figures["heldout_tie_fraction"] == pytest.approx(1 / 6)
    differing = sum(len(set(row["scores"])) > 1 for row in cases.read_jsonl(recipe / "answers.jsonl"))
    assert "baseline_accuracy" in figures and len(read_metrics(recipe / "reward")) == math.ceil(differing / 4)


def test_ppo_writes_metrics_rollouts_report_and_model(recipe):
    run = recipe / "ppo"
    rows = read_metrics(run)
    assert [(row["kind"], row["iteration"]) for row in rows] == [("evaluation", 0), ("ppo", 1), ("ppo", 2)]
    assert rows[-1]["evaluation"]["prompts"] == 3
    for row in rows[1:]:
        step = step_from_row(row)
        assert step.rollout_logprob_gap_max < 1e-4 and step.skipped_steps == 0
        assert {"rollout", "plan", "score", "shape", "update"} <= step.seconds_by_phase.keys()
    rollouts = cases.read_jsonl(run / "rollouts" / "iteration_00001.jsonl")
    assert sorted(row["sequence_id"] for row in rollouts) == list(range(8))
    for row in rollouts:
        assert len(row["response_ids"]) == len(row["advantages"]) == len(row["logprobs"])
        assert row["function_score"] == row["text"].count("a") / len(row["response_ids"])
        assert row["where"].rpartition(":")[0].endswith("prompts.jsonl") and row["prompt"] in cases.PROMPTS
    assert (run / "report.html").stat().st_size > 1000
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["best", "latest", "step_000001", "step_000002"]
    assert PPOConfig.load(run / "config.yaml").iterations == 2


def test_ppo_starts_from_the_statistics_of_the_reward_model(recipe, home, tmp_path):
    saved = json.loads((recipe / "reward" / "model" / "score_statistics.json").read_text())["after"]
    keys = cases.ppo_keys(home, tmp_path / "run", f"ppo.reward_model={recipe}/reward/model")
    with trainer(PPOTrainer, PPOConfig, keys) as ppo:
        assert ppo.components.normalizers["reward_model"].moments.mean.item() == pytest.approx(saved["mean"])
        assert ppo.components.normalizers["reward_model"].moments.variance.sqrt().item() == pytest.approx(saved["std"])


def test_generate_is_what_transformers_generates(recipe, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    keys = [f"generate.model={recipe}/ppo", "generate.prompt=name a cat", "generate.sampling.max_new_tokens=12"]
    assert cli.main(["generate", *keys, f"generate.out={tmp_path}/out.jsonl"]) == 0
    (row,) = cases.read_jsonl(tmp_path / "out.jsonl")
    capsys.readouterr()
    assert cli.main(["generate", *keys]) == 0
    assert "> name a cat" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(recipe / "ppo" / "model")
    tokenizer = AutoTokenizer.from_pretrained(recipe / "ppo" / "model")
    chat = [{"role": "user", "content": "name a cat"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    hf_tokens = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert row["responses"] == [tokenizer.decode(hf_tokens, skip_special_tokens=True)]


def test_export_of_a_run_is_its_model_to_the_bit(recipe, tmp_path):
    for stage in ("sft", "ppo"):
        assert cli.main(["export", f"export.run={recipe}/{stage}", f"export.out={tmp_path}/{stage}"]) == 0
        assert same_files(tmp_path / stage, recipe / stage / "model")
    assert cli.main(["export", f"export.run={recipe}/ppo", f"export.out={tmp_path}/v", "export.role=critic"]) == 0
    assert load_file(tmp_path / "v" / "model.safetensors")["score.weight"].shape == (1, 32)


def test_a_run_with_one_model_is_exported_by_any_name_of_it(recipe, tmp_path, capsys):
    weights = (recipe / "reward" / "model" / "model.safetensors").read_bytes()
    for role in ("actor", "model", "reward"):
        keys = [f"export.run={recipe}/reward", f"export.out={tmp_path}/{role}", f"export.role={role}"]
        assert cli.main(["export", *keys]) == 0
        assert (tmp_path / role / "model.safetensors").read_bytes() == weights
        assert same_files(tmp_path / role, recipe / "reward" / "model")  # the statistics of its scores included
    for run, role in (("reward", "critic"), ("ppo", "reward"), ("sft", "reward")):
        keys = [f"export.run={recipe}/{run}", f"export.out={tmp_path}/no", f"export.role={role}"]
        assert cli.main(["export", *keys]) == 2
        assert f"not {role}" in capsys.readouterr().err


def test_an_export_has_the_score_statistics_of_its_own_checkpoint(home, tmp_path, capsys):
    """Also of a run that has not ended, by the command and from Python, and after a resume."""
    keys = cases.reward_keys(home, tmp_path / "run", "reward.eval_every=2", "reward.epochs=2")

    def exported(name):
        out = f"{tmp_path}/{name}"
        assert cli.main(["export", f"export.run={tmp_path}/run", f"export.out={out}", "export.role=reward"]) == 0
        return saved_statistics(out)

    with trainer(RewardTrainer, RewardConfig, keys) as reward:
        for _ in range(2):
            reward.step()
        scores = reward.evaluate().score_N.double()
        reward.complete_checkpoint()
        assert exported("evaluated")["mean"] == pytest.approx(scores.mean().item())
        reward.save_pretrained(tmp_path / "python")
        assert saved_statistics(tmp_path / "python") == saved_statistics(tmp_path / "evaluated")
        assert "score_statistics" not in capsys.readouterr().err
    with trainer(RewardTrainer, RewardConfig, [*keys, "reward.run.resume=true"]) as reward:
        reward.save_pretrained(tmp_path / "resumed")
        assert saved_statistics(tmp_path / "resumed") == saved_statistics(tmp_path / "evaluated")
        reward.step()
        reward.save_checkpoint()
        reward.complete_checkpoint()
    assert exported("between evaluations") is None
    assert "no score_statistics.json, because held-out scores were not evaluated" in capsys.readouterr().err


def test_a_run_stands_for_its_model_wherever_a_model_is_named(recipe, home, tmp_path):
    keys = cases.ppo_keys(home, tmp_path / "ppo", f"ppo.actor={recipe}/sft", f"ppo.reward_model={recipe}/reward")
    assert cli.main(["ppo", *keys, "ppo.iterations=1", f"ppo.reference={recipe}/sft", "ppo.eval_every=0"]) == 0
    assert cli.main(["sft", *cases.sft_keys(home, tmp_path / "sft", f"sft.model={recipe}/sft")]) == 0
    assert cli.main(["data", "preview", str(home.prompts), "--model", f"{recipe}/sft"]) == 0
    assert saved_statistics(recipe / "reward") == saved_statistics(recipe / "reward" / "model") is not None
    assert icegrt.load_actor(recipe / "sft").architecture.vocab_size == tiny_models.VOCAB


def test_generate_with_a_reward_model_says_what_it_is(recipe, capsys):
    assert cli.main(["generate", f"generate.model={recipe}/reward", "generate.prompt=a"]) == 2
    assert "a reward model or critic" in capsys.readouterr().err


def test_resuming_a_finished_run_changes_nothing(recipe, home):
    keys = cases.ppo_keys(home, recipe / "ppo", f"ppo.actor={recipe}/sft/model", f"ppo.eval_prompts={home.prompts}")
    keys += [f"ppo.reward_model={recipe}/reward/model", "ppo.eval_limit=3"]
    before = {name: (recipe / name).read_bytes() for name in ("ppo/model/model.safetensors", "ppo/metrics.jsonl")}
    assert cli.main(["ppo", *keys, "--resume"]) == 0
    assert {name: (recipe / name).read_bytes() for name in before} == before
    assert cli.main(["sft", *cases.sft_keys(home, recipe / "sft"), "--resume"]) == 0
    assert len(read_metrics(recipe / "sft")) == 2
    assert cli.main(["reward", *cases.reward_keys(home, recipe / "sft"), "--resume"]) == 2  # a run of another stage


@pytest.mark.parametrize(
    ("kind", "config", "keys", "overrides"),
    [
        (PPOTrainer, PPOConfig, cases.ppo_keys, ("ppo.iterations=3", "ppo.kl_control=adaptive")),
        (SFTTrainer, SFTConfig, cases.sft_keys, ("sft.epochs=2", "sft.checkpoint_every=1")),
        (RewardTrainer, RewardConfig, cases.reward_keys, ("reward.epochs=2", "reward.eval_every=1")),
    ],
    ids=["ppo", "sft", "reward"],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(home, tmp_path, kind, config, keys, overrides):
    uninterrupted, parts = tmp_path / "whole", tmp_path / "parts"
    with trainer(kind, config, keys(home, uninterrupted, *overrides)) as run:
        run.train()
    with trainer(kind, config, keys(home, parts, *overrides)) as run:
        run.step()
    with trainer(kind, config, keys(home, parts, *overrides, f"{config.section}.run.resume=true")) as run:
        assert run.done_steps == 1
        run.train()
    assert same_files(uninterrupted / "model", parts / "model")
    assert summary(uninterrupted) == summary(parts)
    rows = [
        [{k: v for k, v in r.items() if "second" not in k} for r in read_metrics(run)] for run in (uninterrupted, parts)
    ]
    assert rows[0] == rows[1]


def test_sft_on_messages_learns_from_every_answer_and_nothing_else(home, tmp_path):
    turns = [("user", "hi"), ("assistant", "ab"), ("user", "zz"), ("assistant", "cd")]
    token_counts = {}
    for name, third in (("one", "zz"), ("other", "qq")):
        rows = [{"messages": [{"role": r, "content": third if t == "zz" else t} for r, t in turns]}] * 4
        keys = cases.sft_keys(home, tmp_path / name, "sft.optimizer.lr=0")
        with trainer(SFTTrainer, SFTConfig, keys, data=rows, heldout=rows) as sft:
            (example, *_) = sft.heldout
            token_counts[name] = (sft.step().tokens, sum(example.action_mask), len(example.response))
    assert token_counts["one"] == token_counts["other"]
    tokens, counted, response_tokens = token_counts["one"]
    assert (
        counted == 6 and response_tokens > counted and tokens == 4 * (response_tokens + 5)
    )  # ab, cd and an EOS each; <user>hi<eos><a>
    words = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ab"}]}
    with trainer(
        SFTTrainer, SFTConfig, cases.sft_keys(home, tmp_path / "single"), data=[words], heldout=[words]
    ) as sft:
        assert sft.heldout[0].action_mask is None


def test_what_a_checkpoint_took_is_shown_once_with_the_iteration_after_it(home, tmp_path):
    keys = cases.ppo_keys(home, tmp_path / "run", "ppo.iterations=4", "ppo.checkpoint_every=2")
    with trainer(PPOTrainer, PPOConfig, keys) as run:
        has_checkpoint_time = ["checkpoint" in step.seconds_by_phase for step in run]
    assert has_checkpoint_time == [False, False, True, False]


def test_greedy_answers_have_scores_and_no_kl(home, tmp_path):
    keys = cases.ppo_keys(home, tmp_path / "run")
    with trainer(PPOTrainer, PPOConfig, keys) as run:
        greedy, sampled = (run.assess(run.prompts[:3], greedy=greedy) for greedy in (True, False))
    assert greedy.kl_N is None and bool(greedy.total_N.isfinite().all())
    assert sampled.kl_N.tolist() == [0.0] * 3  # nothing has been learnt yet


def test_prompts_whose_responses_all_tie_take_no_step_and_make_no_nan(home, tmp_path):
    ties = [{"prompt": p, "responses": ["a", "b"], "scores": [1.0, 1.0]} for p in cases.PROMPTS]
    keys = cases.reward_keys(home, tmp_path / "run")
    with trainer(RewardTrainer, RewardConfig, keys, data=ties + cases.ranking_rows(), heldout=ties) as run:
        assert len(run.train_rankings) == len(cases.ranking_rows())
        steps = list(run)
        figures = run.finish()
    assert all(step.loss > 0.0 for step in steps) and figures["heldout_pairs"] == 0
    assert figures["heldout_accuracy"] is None  # not the 0.5 of a guess
    assert all(bool(t.isfinite().all()) for t in load_file(tmp_path / "run" / "model" / "model.safetensors").values())


def test_nothing_but_ties_is_refused(home, tmp_path):
    ties = [{"prompt": p, "responses": ["a", "b"], "scores": [1.0, 0.9]} for p in cases.PROMPTS]
    keys = cases.reward_keys(home, tmp_path / "run", "reward.tie_margin=0.2")
    with pytest.raises(DataError, match=r"no prompt has responses whose scores differ by reward.tie_margin 0\.2"):
        RewardTrainer(RewardConfig.load(None, keys), data=ties)


def test_early_stopping_exports_the_best_weights(home, tmp_path):
    keys = ["reward.epochs=8", "reward.eval_every=1", "reward.patience=2", "reward.optimizer.lr=0.05"]
    # The held-out rows say the opposite of the others: learning makes them worse.
    upside_down = [row | {"scores": [-s for s in row["scores"]]} for row in cases.ranking_rows()]
    with trainer(
        RewardTrainer, RewardConfig, cases.reward_keys(home, tmp_path / "run", *keys), heldout=upside_down
    ) as run:
        figures = run.train()
    losses = [row["heldout_loss"] for row in read_metrics(tmp_path / "run")]
    assert figures["steps"] == len(losses) < 16
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 2
    assert figures["heldout_loss_after"] == pytest.approx(min(losses), rel=1e-6)


def test_ptx_adaptive_kl_kl_in_the_loss_and_critic_from_the_actor(home, tmp_path):
    keys = [f"ppo.ptx_data=[{{path: {home.sft}}}]", "ppo.ptx_coef=0.5", "ppo.ptx_sequences=2", "ppo.kl_in=loss"]
    keys += ["ppo.kl_control=adaptive", "ppo.kl_target_nats_per_response=0.01", "ppo.kl_horizon_responses=100"]
    keys += ["ppo.reward_model=", "ppo.critic.init=actor", "ppo.optimizer.lr=5e-3"]
    with trainer(PPOTrainer, PPOConfig, cases.ppo_keys(home, tmp_path / "run", *keys)) as ppo:
        head = ppo.critic.model.head.weight
        assert not head.any()
        first, second = list(ppo)
        assert head.any()
    assert first.ptx_loss > second.ptx_loss > 0
    # The first KL is 0, below the target: the coefficient falls by its limit, 0.2 of 8 responses in 100.
    assert first.kl_nats_per_response == 0.0 and first.kl_coef == 0.05
    assert second.kl_coef == pytest.approx(0.05 * (1 - 0.2 * 8 / 100))
    rows = cases.read_jsonl(tmp_path / "run" / "rollouts" / "iteration_00002.jsonl")
    shaped = sum(row["score"] for row in rows) / len(rows)
    assert second.kl_nats_per_response != 0 and second.reward_mean == pytest.approx(shaped, abs=1e-6)


def test_an_easy_reward_rises(home, tmp_path):
    keys = ["ppo.iterations=8", "ppo.samples_per_prompt=8", "ppo.token_budget=512", "ppo.checkpoint_every=100"]
    keys += ["ppo.reward_model=", "ppo.critic.init=actor", "ppo.critic.optimizer.lr=1e-2", "ppo.kl_coef=0"]
    keys += ["ppo.optimizer.lr=2e-2", "ppo.optimizer.schedule=constant"]
    with trainer(PPOTrainer, PPOConfig, cases.ppo_keys(home, tmp_path / "run", *keys)) as ppo:
        scores = [step.function_score_mean for step in ppo]
    assert max(scores[:2]) < 0.1 and min(scores[-2:]) > 0.4, scores  # by chance one token in 61 is an a


def test_a_reward_model_that_should_not_be_trusted_is_announced(home, tmp_path, capsys):
    # The chosen answer is always the longer one; without a learning rate the model does not find out.
    pairs = [{"prompt": p, "chosen": "abcdef", "rejected": "ab"} for p in cases.PROMPTS]
    data = f"[{{path: {cases.write_jsonl(tmp_path / 'pairs.jsonl', pairs)}}}]"
    keys = cases.reward_keys(home, tmp_path / "run", f"reward.data={data}", f"reward.heldout={data}")
    assert cli.main(["reward", *keys, "reward.epochs=1", "reward.optimizer.lr=0"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "judged on" in line] == [
        "warning: the reward model is judged on 8 held-out pairs only, so its accuracy of 0.500 may be off by 0.35; "
        "hold out more prompts (reward.heldout or reward.heldout_fraction)"
    ]
    (worse,) = [line for line in lines if "best single feature" in line]
    assert "right on 0.500 of the held-out pairs, its best single feature (length (higher)) on 1.000" in worse


def test_a_reward_model_better_than_its_features_on_many_pairs_is_not_announced():
    figures = {"heldout_pairs": 50, "heldout_accuracy": 0.8, "baseline_accuracy": 0.8, "baseline_feature": "length"}
    assert surprises(figures) == []
    assert surprises({"heldout_pairs": 0, "heldout_accuracy": None}) == []


def test_an_accuracy_on_no_pair_is_not_reported(home, tmp_path, capsys):
    tied = [row | {"scores": [1.0] * 4} for row in cases.ranking_rows()]
    heldout = cases.write_jsonl(tmp_path / "tied.jsonl", tied)
    keys = cases.reward_keys(home, tmp_path / "run", f"reward.heldout=[{{path: {heldout}}}]", "reward.epochs=1")
    assert cli.main(["reward", *keys]) == 0
    stdout = capsys.readouterr().out
    assert "held-out accuracy is not known" in stdout and "0.500" not in stdout
