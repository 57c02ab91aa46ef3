"""What must not enter the figures or weights of PPO: a drifting normaliser, dropped rows, scores that are no numbers.

The second half: seeds of any size, autograd left off by others, rows beyond JSON, and a warm-up as long as the run.
"""

import datetime
import json
import math

import pytest
import torch

from icegrt.config import CriticConfig, OptimizerConfig, RewardCallConfig
from icegrt.errors import RewardError, RunError
from icegrt.metrics import read_metrics
from icegrt.ppo.batch_plan import stream_seed
from icegrt.ppo.trainer import PPOTrainer
from tests.helpers import tiny_models as tiny
from tests.helpers.stage_cases import save_model

FROZEN = {
    "optimizer": OptimizerConfig(lr=0.0),
    "critic": CriticConfig(init="actor", optimizer=OptimizerConfig(lr=0.0)),
    "eval_every": 1,
    "checkpoint_every": 2,
}


EVERY_FORM = pytest.mark.parametrize("form", ["folder", "memory"])


def scorer(form, folder, head=None):
    """Return a reward model, as a folder or in memory. head: what its head is filled with."""
    model = tiny.scorer(1)
    if head is not None:
        with torch.no_grad():
            model.score.weight.fill_(head)
    return save_model(folder / "scorer", model, tiny.tokenizer()) if form == "folder" else model


def trainer(folder, reward=None, prompts=tiny.PROMPTS, **changes):
    settings = {"iterations": 1, "critic": CriticConfig(init="actor")} | changes
    if "on_error" in settings:
        settings["reward"] = RewardCallConfig(on_error=settings.pop("on_error"))
    held_out = tiny.PROMPTS[:4] if settings.get("eval_every") else None
    reward = tiny.count_letters if reward is None else reward
    config = tiny.ppo_config(folder, **settings)
    return PPOTrainer(config, tiny.causal_lm(0), tiny.tokenizer(), reward, prompts, eval_prompts=held_out)


def evaluations(folder):
    rows = read_metrics(folder)
    return [row.get("evaluation", row) for row in rows if row["kind"] == "evaluation" or row.get("evaluation")]


# -- scores of evaluations ---------------------------------------------------------------------------------------------


@EVERY_FORM
def test_without_learning_all_evaluations_have_the_same_score(form, tmp_path):
    with trainer(tmp_path / "run", scorer(form, tmp_path), iterations=6, **FROZEN) as run:
        steps = list(run)
    rows = evaluations(tmp_path / "run")
    assert [row["iteration"] for row in rows] == list(range(7))
    assert len({row["reward_model_score_mean"] for row in rows}) == 1
    assert len({row["score_mean"] for row in rows}) == 1
    assert len({step.score_mean for step in steps}) == 6  # training pays by the running moments
    assert (tmp_path / "run" / "checkpoints" / "best").read_text().strip() == "step_000002"  # the first of equals


@pytest.mark.parametrize("older", [False, True])
def test_a_resumed_run_keeps_the_normalisation_of_its_evaluations(older, tmp_path):
    changes = {"iterations": 4, **FROZEN}
    with trainer(tmp_path / "run", tiny.scorer(1), **changes) as run:
        run.step()
        run.step()
    if older:  # a checkpoint from before evaluations had moments of their own
        path = tmp_path / "run" / "checkpoints" / "step_000002" / "state.json"
        document = json.loads(path.read_text())
        del document["trainer"]["evaluation_scalings"]
        path.write_text(json.dumps(document, indent=1))
        manifest = path.with_name("manifest.json")
        entries = json.loads(manifest.read_text())
        entries["files"].pop("state.json")
        manifest.write_text(json.dumps(entries))
    with trainer(tmp_path / "run", tiny.scorer(1), run={"resume": True}, **changes) as run:
        assert run.done_steps == 2
        list(run)
    rows = evaluations(tmp_path / "run")
    assert len(rows) == 5 and len({row["score_mean"] for row in rows[3:]}) == 1
    assert older or len({row["score_mean"] for row in rows}) == 1


# -- dropped rows ------------------------------------------------------------------------------------------------------


@EVERY_FORM
def test_a_dropped_response_counts_in_no_score(form, tmp_path):
    def fails(samples):
        return [math.nan if s.row["prompt"] in ("sale", "buy now") else 1.0 for s in samples]

    def outlier(samples):
        return [100.0 if s.row["prompt"] in ("sale", "buy now") else 1.0 for s in samples]

    changes = {"prompts_per_iteration": 10, "samples_per_prompt": 1, "eval_every": 1, "on_error": "drop"}
    with trainer(tmp_path / "run", [scorer(form, tmp_path), outlier, fails], **changes) as run:
        (step,) = list(run)
        (normalizer,) = run.components.normalizers.values()
    with open(tmp_path / "run" / "rollouts" / "iteration_00001.jsonl") as file:
        kept = [row["reward_model_score"] for row in map(json.loads, file) if not row["dropped"]]
    assert len(kept) == 8 and step.dropped_responses == 2
    assert normalizer.state()["count"] == 8 and normalizer.state()["mean"] == pytest.approx(sum(kept) / 8, abs=1e-6)
    assert step.reward_model_score_mean == pytest.approx(sum(kept) / 8, abs=1e-6)
    assert step.sources["reward_model"]["score_mean"] == pytest.approx(sum(kept) / 8, abs=1e-6)
    assert step.sources["outlier"]["score_mean"] == step.function_score_mean == 1.0
    assert step.evaluation.function_score_mean == 1.0  # two of the four held-out prompts are dropped


# -- scores that are no numbers, and scores without a spread -----------------------------------------------------------


@EVERY_FORM
def test_a_reward_model_without_a_finite_score_is_named_and_leaves_the_moments_alone(form, tmp_path):
    with trainer(tmp_path / "run", scorer(form, tmp_path, head=3e38)) as run:
        with pytest.raises(RewardError, match=r"^iteration 1: `reward_model`: row \d+: .* not a finite number"):
            run.step()
        (normalizer,) = run.components.normalizers.values()
    assert normalizer.state() == {"count": 0.0, "mean": 0.0, "m2": 0.0}


def test_a_weighted_sum_beyond_fp32_is_refused(tmp_path):
    with trainer(tmp_path / "run", [(lambda samples: [1e38] * len(samples), 10.0)]) as run:
        with pytest.raises(RewardError, match=r"iteration 1: `weighted sum`: .* lower the weights"):
            run.step()


@EVERY_FORM
def test_a_single_score_is_paid_as_it_is(form, tmp_path):
    changes = {"prompts_per_iteration": 1, "samples_per_prompt": 1, "minibatches": 1, "score_clip": 0.0}
    with trainer(tmp_path / "run", scorer(form, tmp_path), **changes) as run:
        (step,) = list(run)
    assert step.score_mean == pytest.approx(step.reward_model_score_mean, abs=1e-6)


# -- seeds, autograd, rows, schedules ----------------------------------------------------------------------------------


def test_seeds_of_any_size_train_and_differ(tmp_path):
    assert stream_seed(7, 3) == (7 << 32) ^ 3
    seeds = [1, 1 + 2**32, 1 + 2**33, 20261128123456, 2**64 + 1]
    streams = {stream_seed(seed, 1) for seed in seeds}
    assert len(streams) == len(seeds) and all(0 <= stream < 2**64 for stream in streams)
    with trainer(tmp_path / "run", run={"seed": 20261128123456}) as run:
        assert len(list(run)) == 1


def test_autograd_that_others_left_off_changes_no_bit(tmp_path):
    def without_autograd(samples):
        torch.set_grad_enabled(False)
        return tiny.count_letters(samples)

    weights = []
    for number in range(3):
        reward = without_autograd if number == 2 else tiny.count_letters
        try:
            with torch.set_grad_enabled(number != 1):
                with trainer(tmp_path / str(number), [reward], iterations=2) as run:
                    list(run)
                    weights.append({name: p.clone() for name, p in tiny.parameters(run.actor).items()})
        finally:
            torch.set_grad_enabled(True)
    for name, expected in weights[0].items():
        assert torch.equal(weights[1][name], expected) and torch.equal(weights[2][name], expected)


def test_inference_mode_is_refused_by_name(tmp_path):
    with torch.inference_mode(), pytest.raises(RunError, match="inference_mode is on"):
        trainer(tmp_path / "run")
    with trainer(tmp_path / "run") as run:
        with torch.inference_mode(), pytest.raises(RunError, match="inference_mode is on"):
            run.step()


def test_what_json_has_no_type_for_is_written_as_text(tmp_path):
    date = datetime.datetime(2026, 1, 1)
    rows = [{"prompt": [{"role": "user", "content": word, "time": date}]} for word in tiny.WORDS]
    with trainer(tmp_path / "run", prompts=rows) as run:
        list(run)
    with open(tmp_path / "run" / "rollouts" / "iteration_00001.jsonl") as file:
        assert {json.loads(line)["prompt"][0]["time"] for line in file} == {str(date)}


def test_a_warm_up_as_long_as_the_run_is_announced(tmp_path, capsys):
    with trainer(tmp_path / "run", critic=CriticConfig(init="actor", warmup_iterations=5)):
        pass
    assert "ppo.critic.warmup_iterations is 5 and ppo.iterations 1: the actor takes no step" in capsys.readouterr().err


def test_a_relative_folder_stays_where_the_run_began(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def leaves(samples):
        monkeypatch.chdir(tmp_path / "elsewhere")
        return tiny.count_letters(samples)

    with trainer("run", [leaves], iterations=2, checkpoint_every=1) as run:
        run.train()
    assert not list((tmp_path / "elsewhere").iterdir())
    assert len(list((tmp_path / "run" / "rollouts").iterdir())) == 2 and (tmp_path / "run" / "model").is_dir()


# -- log-probs and values that are no numbers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("actor", r"the actor gives a log-prob of nan to token \d+ of response \d+ \(.*; its weights are not finite"),
        ("reference", r"the reference gives a log-prob of nan .* Set ppo\.reference"),
        ("critic", r"the critic gives a value of nan .* Lower ppo\.critic\.optimizer\.lr"),
    ],
)
def test_a_log_prob_or_value_that_is_no_number_is_named_with_its_role_and_response(name, message, tmp_path):
    class BreaksWeights:
        def on_rollout(self, run, responses):
            with torch.no_grad():
                next(run.components.roles[name].model.parameters()).fill_(math.nan)

    with trainer(tmp_path / "run") as run:
        run.callbacks.append(BreaksWeights())
        with pytest.raises(RunError, match="^iteration 1: " + message):
            run.step()


def test_an_iteration_that_draws_more_prompts_than_there_are_says_so_once(tmp_path, capsys):
    with trainer(tmp_path / "run", prompts=tiny.PROMPTS[:3], iterations=2) as run:
        list(run)
    err = capsys.readouterr().err
    assert err.count("ppo.prompts_per_iteration is 4, but there are 3 prompts") == 1
    with trainer(tmp_path / "enough", prompts=tiny.PROMPTS[:4]):
        pass
    assert "but there are" not in capsys.readouterr().err
