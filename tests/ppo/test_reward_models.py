"""Several reward models in one PPO run: each with its weight, its own normalisation, its own name in what is logged."""

import json

import numpy as np
import pytest
import torch

import icegrt
from icegrt.errors import ConfigError
from icegrt.metrics import read_metrics
from icegrt.ppo.reward_sources import RewardComposition
from tests.helpers import stage_cases as cases
from tests.helpers import tiny_models as tiny

WEIGHTS = {"reward_model": 0.5, "safety": -1.5, "reward_model_2": 2.0}
SAVED = {"count": 40, "mean": 1.0, "std": 3.0}  # scores of `safety` that are known before the run
CLIP, PENALTY, FUNCTION_WEIGHT = 1.2, 0.25, 3.0


@pytest.fixture(scope="module")
def scorers():
    """By name; of other widths and depths than the actor."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return {"reward_model": tiny.scorer(1), "safety": tiny.scorer(2, **shape), "reward_model_2": tiny.scorer(3)}


@pytest.fixture(scope="module")
def ran(scorers, tmp_path_factory):
    """A run of two iterations with three models and a function, from the configuration: folder and steps."""
    place = tmp_path_factory.mktemp("models")
    home = cases.make_home(place / "home")
    paths = {name: cases.save_model(place / name, model, tiny.tokenizer()) for name, model in scorers.items()}
    (place / "safety" / "score_statistics.json").write_text(json.dumps({"after": SAVED}))
    sources = [
        {"model": paths["safety"], "name": "safety", "weight": WEIGHTS["safety"]},
        {"model": paths["reward_model_2"], "weight": WEIGHTS["reward_model_2"]},
    ]
    keys = cases.ppo_keys(
        home, place / "run", f"ppo.reward_model={paths['reward_model']}", f"ppo.reward.sources={json.dumps(sources)}",
        f"ppo.reward_model_weight={WEIGHTS['reward_model']}", f"ppo.reward_function_weight={FUNCTION_WEIGHT}",
        f"ppo.score_clip={CLIP}", "ppo.score_shift=true", f"ppo.missing_eos_penalty={PENALTY}",
    )  # fmt: skip
    with icegrt.PPOTrainer(icegrt.PPOConfig.load(None, keys)) as trainer:
        return trainer.dir, list(trainer)


def rollouts(folder, iteration):
    return cases.read_jsonl(folder / "rollouts" / f"iteration_{iteration:05d}.jsonl")


def raw_scores(model, row):
    """What transformers' model says of a response, read at its last token."""
    with torch.no_grad():
        hidden = model.model(torch.tensor([row["prompt_ids"] + row["response_ids"]])).last_hidden_state
        return float(model.score(hidden[0, -1]))


def test_the_total_is_the_weighted_sum_of_scores_that_are_normalised_apart(ran, scorers):
    folder, steps = ran
    known = {name: [] for name in scorers}
    for step in steps:
        rows = rollouts(folder, step.iteration)
        expected = np.array([
            FUNCTION_WEIGHT * row["function_score"] - PENALTY * (row["finish_reason"] == "length") for row in rows
        ])  # fmt: skip
        clipped = 0
        for name, model in scorers.items():
            raw = np.array([raw_scores(model, row) for row in rows])
            known[name] += list(raw)
            mean, std = np.mean(known[name]), np.std(known[name])
            if name == "safety":
                n, k = len(known[name]), SAVED["count"]
                pooled = (n * mean + k * SAVED["mean"]) / (n + k)
                squares = n * (std**2 + (mean - pooled) ** 2) + k * (SAVED["std"] ** 2 + (SAVED["mean"] - pooled) ** 2)
                mean, std = pooled, (squares / (n + k)) ** 0.5
            normalised = (raw - mean) / std
            clipped += int((abs(normalised) > CLIP).sum())
            expected += WEIGHTS[name] * np.clip(normalised, -CLIP, CLIP)
        assert [row["score"] for row in rows] == pytest.approx(expected, abs=1e-4) and clipped > 0
        assert step.score_mean == pytest.approx(expected.mean(), abs=1e-4)


def test_each_model_is_logged_by_its_name(ran, scorers):
    folder, steps = ran
    for step in steps:
        rows = rollouts(folder, step.iteration)
        assert list(step.sources) == ["reward_model", "safety", "reward_model_2", "share_of_a"]
        for name, model in scorers.items():
            raw = [raw_scores(model, row) for row in rows]
            figures = step.sources[name]
            assert figures["score_mean"] == pytest.approx(np.mean(raw), abs=1e-4)
            assert figures["score_std"] == pytest.approx(np.std(raw), abs=1e-4)
            if name == "reward_model":
                assert set(figures) == {"score_mean", "score_std"}
                assert step.reward_model_score_mean == pytest.approx(figures["score_mean"])
                assert [row["reward_model_score"] for row in rows] == pytest.approx(raw, abs=1e-4)
            else:
                assert figures["weight"] == WEIGHTS[name]
                said = [row["sources"][name] for row in rows]
                assert [part["score"] for part in said] == pytest.approx(raw, abs=1e-4)
                assert all((part["weight"], part["error"]) == (WEIGHTS[name], None) for part in said)
        assert all(list(row["sources"]) == ["safety", "reward_model_2", "share_of_a"] for row in rows)
    logged = [row["sources"] for row in read_metrics(folder) if row["kind"] == "ppo"]
    assert logged == [json.loads(json.dumps(step.sources)) for step in steps]


# -- from Python ----------------------------------------------------------------------------------------------------


def one(samples):
    return [1.0] * len(samples)


def test_weights_and_names_of_what_python_gives(scorers):
    config = icegrt.PPOConfig(reward_model_weight=0.5, reward_function_weight=5.0)
    a, b, c = scorers.values()
    sources = RewardComposition.of(config, [(a, 0.3), b, one, c, (one, 0.2), "http://h:1/x"])
    models = {role: (entry.name, entry.weight, entry.model) for role, entry in sources.models.items()}
    assert models == {
        "reward": ("reward_model", 0.3, a),
        "reward:reward_model_2": ("reward_model_2", 0.5, b),
        "reward:reward_model_3": ("reward_model_3", 1.0, c),
    }
    called = [(source.name, source.weight) for source in sources.sources.scorers]
    assert called == [("one", 5.0), ("one_2", 0.2), ("h:1", 1.0)]


@pytest.mark.parametrize("weight", ["0.5", True, float("nan"), tiny.count_letters])
def test_a_weight_that_is_no_number_is_refused(scorers, weight):
    with pytest.raises(ConfigError, match=r"\(source, weight\) with a finite number"):
        RewardComposition.of(icegrt.PPOConfig(), [(scorers["safety"], weight)])


def test_a_critic_starts_from_the_first_model_on_the_scale_of_what_that_pays(scorers, tmp_path):
    first, second = (cases.save_model(tmp_path / name, scorers[name]) for name in ("safety", "reward_model"))
    (tmp_path / "safety" / "score_statistics.json").write_text(json.dumps({"after": SAVED}))
    reward = [(first, 0.6), (second, 7.0)]
    with icegrt.PPOTrainer(tiny.ppo_config(tmp_path / "run"), tiny.causal_lm(), tiny.tokenizer(), reward,
                           tiny.PROMPTS) as run:  # fmt: skip
        assert list(run.components.roles) == ["actor", "reference", "reward", "reward:reward_model_2", "critic"]
        raw, critic = run.components.roles["reward"].model.head.weight, run.critic.model.head.weight
        assert not any(role.learns for name, role in run.components.roles.items() if name.startswith("reward"))
        assert torch.equal(critic, raw * (0.6 / SAVED["std"]))


# -- in a checkpoint ------------------------------------------------------------------------------------------------


def test_moments_in_a_checkpoint_are_by_name_and_those_of_one_model_may_have_none(scorers, tmp_path):
    def made(name, reward):
        given = tiny.causal_lm(), tiny.tokenizer(), reward, tiny.PROMPTS
        return icegrt.PPOTrainer(tiny.ppo_config(tmp_path / name), *given)

    with made("one", scorers["safety"]) as run:
        run.step()
        state = json.loads(json.dumps(run.state()))
    with made("same", [(scorers["safety"], 0.1), one]) as run:
        run.load_state(state)
        assert run.state()["scalings"] == state["scalings"] and state["scalings"]["reward_model"]["count"] == 8
    nameless = {name: part for name, part in state.items() if name != "scalings"}
    nameless["scaling"] = state["scalings"]["reward_model"]
    with made("nameless", scorers["safety"]) as run:
        run.load_state(nameless)
        assert run.state()["scalings"] == state["scalings"]
    with made("more", [scorers["safety"], scorers["reward_model"]]) as run:
        for older in (state, nameless):
            with pytest.raises(ConfigError, match="of the reward models reward_model; this run has reward_model, rew"):
                run.load_state(older)
