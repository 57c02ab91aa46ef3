"""Values and log-probs of the update's own passes under dynamic sampling, offloading and dropped responses.

Every run has the bits of the same run with inference passes and all roles resident.
"""

import functools
import json
import math

import pytest

from icegrt.config import CriticConfig, OptimizerConfig, PPOConfig, RewardCallConfig
from icegrt.errors import RewardError
from icegrt.metrics import calibration_path
from icegrt.residency import PARAMETERS, host_memory
from tests.helpers import tiny_models as tiny
from tests.helpers.late_copies import LateCopies
from tests.helpers.layout_cases import step_metrics
from tests.helpers.tied_scores import has_vowel_early, tied_config, tied_trainer

pytestmark = pytest.mark.usefixtures("cluster")

REUSES = {
    "values": {"reuse_update_values": True},
    "log-probs": {"reuse_update_logprob": True},
    "both": {"reuse_update_values": True, "reuse_update_logprob": True},
}
OFFLOADS = {
    "resident": {},
    "offloaded": {"offload": {"roles": "all"}},
    "prefetched by layers": {"offload": {"roles": "all", "prefetch": True, "reference": "layers"}},
}
DROPS = {"reward": RewardCallConfig(on_error="drop", workers=0)}
CASES = {
    # Prompts are replaced; the second case also has prompts of one score each, which fill the iteration.
    "replaced prompts": {"dynamic_sampling": True},
    "filled prompts": {"dynamic_sampling": True, "dynamic_sampling_max_rounds": 1},
    "replaced prompts and dropped responses": {"dynamic_sampling": True} | DROPS,
    "prompts that share rows": {"dynamic_sampling": True, "minibatch_by": "prompt", "kl_in": "loss"},
    "several passes of the critic": {
        "critic": CriticConfig(init="actor", optimizer=OptimizerConfig(lr=1e-2), epochs=2)
    },
}
PROBE = {0, 1}  # the groups of the first look at the reward sources, before training


def dropping(samples):
    """Tied scores; the first response of each prompt has none."""
    is_probe = {s.group for s in samples} == PROBE
    scores = has_vowel_early(samples)
    return [math.nan if s.index == 0 and not is_probe else x for s, x in zip(samples, scores, strict=True)]


def none_counted(samples, *, from_call, calls):
    """No score from the call `from_call` on."""
    calls.append(len(samples))
    return [math.nan if len(calls) >= from_call else x for x in has_vowel_early(samples)]


def open_run(folder, settings, reward=None):
    keys = {
        "advantage": "gae",
        "kl_coef": 0.1,
        "critic": CriticConfig(init="actor", optimizer=OptimizerConfig(lr=1e-2)),
        "ppo_epochs": 1,
        "minibatches": 1,
        "prompts_per_iteration": 3,
        "token_budget": 40,
        "checkpoint_every": 50,
        # Rows without advantage would be packed anew for the actor's pass, which rounds differently with ratios of 1.
        "skip_zero_advantage": False,
    }
    return tied_trainer(
        tied_config(folder, **(keys | settings)),
        reward=reward or (dropping if "reward" in settings else has_vowel_early),
    )


def outcome(folder, settings):
    """Return metrics, weights and calibration tables of two iterations."""
    with open_run(folder, settings) as run:
        steps = [step_metrics(run.step()) for _ in range(2)]
        weights = []
        for role in run.roles:
            with role.placement.hold(PARAMETERS):
                weights.append(tiny.parameters(role))
    tables = [json.loads(calibration_path(folder, n).read_text()) for n in (1, 2)]
    return steps, weights, tables


@pytest.fixture(scope="module")
def with_inference(tmp_path_factory, cluster):
    """Return the outcome of a case's resident run with inference passes, run once."""
    return functools.cache(lambda case: outcome(tmp_path_factory.mktemp("run") / "run", CASES[case]))


@pytest.mark.parametrize(
    ("reuse", "offload"),
    [("values", "resident"), ("log-probs", "resident"), ("both", "offloaded"), ("both", "prefetched by layers")],
)
@pytest.mark.parametrize("case", CASES)
def test_a_run_has_the_bits_of_a_resident_run_with_inference_passes(
    case, reuse, offload, with_inference, tmp_path, monkeypatch
):
    monkeypatch.setattr(host_memory, "copies_of", lambda device: LateCopies())
    expected_steps, expected_weights, expected_tables = with_inference(case)
    steps, weights, tables = outcome(tmp_path / "run", CASES[case] | REUSES[reuse] | OFFLOADS[offload])
    assert steps == expected_steps and tables == expected_tables
    assert all(tiny.same(*pair) for pair in zip(weights, expected_weights, strict=True))
    assert steps[0]["grad_norm_critic"] > 0 < steps[0]["grad_norm_actor"]
    filled, skipped = (sum(step[name] for step in steps) for name in ("filled_prompts", "skipped_prompts"))
    assert (filled > 0) == (case == "filled prompts")
    if "replaced" in case:
        assert skipped > 0
    assert ("dropped" in case) == bool(steps[0]["dropped_responses"])


@pytest.mark.parametrize("sampling", [{}, {"dynamic_sampling": True, "dynamic_sampling_max_rounds": 2}])
@pytest.mark.parametrize("offload", ["resident", "prefetched by layers"])
@pytest.mark.parametrize("reuse", [{}, REUSES["both"]], ids=["inference", "reuse"])
def test_an_iteration_without_a_score_ends_the_run_before_a_weight_changes(sampling, offload, reuse, tmp_path):
    calls = []
    settings = DROPS | sampling | reuse | OFFLOADS[offload]
    # The first look, one iteration (of at most two draws), and then no score.
    reward = functools.partial(none_counted, from_call=4 if sampling else 3, calls=calls)
    with open_run(tmp_path / "run", settings, reward) as run:
        run.step()
        changes = [role.weight_changes for role in run.roles]
        with pytest.raises(RewardError, match="iteration 2: every response of an iteration was dropped"):
            run.step()
        assert [role.weight_changes for role in run.roles] == changes and run.done_steps == 1


def test_the_settings_reuse_both_passes():
    config = PPOConfig(**REUSES["both"], ppo_epochs=1, minibatches=1, kl_logprobs="rollout")
    assert not config.critic_is_inferred and not config.actor_is_inferred
