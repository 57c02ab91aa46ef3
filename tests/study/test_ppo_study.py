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
        base={"recipe": str(recipe), "overrides": keys},
        settings=[
            {"name": "one"},
            {"name": "two ranks", "ranks": 2},
        ],
        seeds=[0, 1],
        measures=[{"name": "entropy", "field": "entropy_nats_per_token"}],
        contrasts=[{"name": "layout", "a": "two ranks", "b": "one", "expected": "equal", "margin": 0.02}],
        pilot={"setting": "one", "seeds": [7, 8]},
        parallel=2,
    )
    outcome = run_study(config)
    assert outcome.complete, outcome.results.failures
    results = outcome.results
    # Two ranks sample the same responses and take the same steps.
    values = results.values["entropy"]
    for seed in (0, 1):
        assert values["two ranks"][seed] == pytest.approx(values["one"][seed], abs=1e-3) and values["one"][seed] > 0.1
    assert results.contrasts[0].outcome == "equal"
    assert all(len(curve) == 2 for curves in results.curves["entropy"].values() for curve in curves)
    assert (tmp_path / "study" / "power.json").is_file() and (tmp_path / "study" / "entropy.png").is_file()
