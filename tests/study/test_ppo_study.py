"""A short study over real PPO runs: a recipe, one process and two ranks, and the statement of power."""

import pytest

from icegrt.config import StudyConfig
from icegrt.study.study import run_study
from tests.helpers import stage_cases as cases


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_study_of_ppo_finds_two_ranks_equal_to_one(tmp_path):
    home = cases.make_home(tmp_path / "home")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("ppo: {critic: {init: actor}}\n", encoding="utf-8")
    keys = [key for key in cases.ppo_keys(home, "unused") if "run.dir" not in key and "reward_model" not in key]
    config = StudyConfig(
        dir=str(tmp_path / "study"),
        base={"recipe": str(recipe), "overrides": [*keys, f"ppo.eval_prompts={home.prompts}", "ppo.eval_every=1"]},
        settings=[
            {"name": "one"},
            {"name": "two ranks", "ranks": 2},
        ],
        seeds=[0, 1],
        measures=[{"name": "score", "field": "evaluation.function_score_mean"}],
        contrasts=[{"name": "layout", "a": "two ranks", "b": "one", "expected": "equal", "margin": 0.02}],
        pilot={"setting": "one", "seeds": [7, 8]},
        parallel=2,
    )
    outcome = run_study(config)
    assert outcome.complete, outcome.results.failures
    results = outcome.results
    # Two ranks sample the same responses and take the same steps.
    for seed in (0, 1):
        assert results.values["score"]["two ranks"][seed] == pytest.approx(
            results.values["score"]["one"][seed], abs=1e-6
        )
    assert results.contrasts[0].outcome == "equal"
    assert all(len(curve) == 3 for curves in results.curves["score"].values() for curve in curves)
    assert (tmp_path / "study" / "power.json").is_file() and (tmp_path / "study" / "score.png").is_file()
