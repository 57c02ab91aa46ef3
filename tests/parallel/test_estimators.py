"""Estimators without a critic in every kind of layout: the same run as one process, though groups lie on several ranks.

Responses to a prompt are on both data-parallel ranks, some are dropped, many scores tie: baselines, what leaves the
actor's pass and which prompts are drawn again are decisions of all ranks.
"""

import math

import pytest
import torch

from icegrt.config import OptimizerConfig, ParallelConfig, RewardCallConfig
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.layout import Layout
from tests.helpers import tiny_models as tiny
from tests.helpers.layout_cases import LAYOUTS, step_metrics
from tests.helpers.ranks import launch
from tests.helpers.tied_scores import has_vowel_early, tied_config, tied_trainer

CASES = {
    "rloo, rows leave": {"reward": RewardCallConfig(on_error="drop", workers=0)},
    "grpo, dynamic sampling": {
        "advantage": "grpo",
        "group_std": "batch",
        "kl_coef": 0.05,
        "dynamic_sampling": True,
        "minibatch_by": "prompt",
        "reward": RewardCallConfig(on_error="drop", workers=0),
    },
    "reinforce++": {"advantage": "reinforce++", "kl_coef": 0.05},
    "grpo": {"advantage": "grpo"},
    "grpo without std": {"advantage": "grpo", "group_std": "none", "kl_coef": 0.05},
}
FIGURES = ("policy_loss", "kl_nats_per_response", "score_mean", "advantage_mean", "advantage_std")
COUNTS = ("zero_advantage_fraction", "skipped_prompts", "sampling_rounds", "dropped_responses", "empty_steps")
LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("tp2_dp2", "pp2_virtual", "pp2_dp2")]


def sometimes_dropped(samples):
    """Tied scores; one response in five has none."""
    scores = has_vowel_early(samples)
    return [math.nan if sum(s.tokens) % 5 == 1 else x for s, x in zip(samples, scores, strict=True)]


class Watch:
    """Sampled tokens, the ranks of the responses to each prompt, and if a rank has moments of its own."""

    def __init__(self):
        self.tokens, self.groups_on_several_ranks, self.own_moments = [], 0, False

    def on_rollout(self, run, responses):
        self.tokens.append([(r.prompt_index, r.sample, r.sequence_id, r.tokens) for r in responses])

    def on_scores(self, run, experience):
        plan = experience.plan
        rank_of = {n: rank for rank, indices in enumerate(plan.rank_assignment) for n in indices}
        ranks = {}
        for n, response in enumerate(plan.responses):
            ranks.setdefault(response.prompt_index, set()).add(rank_of[n])
        self.groups_on_several_ranks += sum(len(found) > 1 for found in ranks.values())
        self.own_moments |= bool(experience.shaped.moments.mean != experience.moments.mean)


def runs(folder, layout):
    """Two iterations of every case; rank 0 writes what it saw."""
    parallel, results = ParallelConfig(**LAYOUTS[layout][1]), {}
    still = OptimizerConfig(lr=1e-4, schedule="constant")
    with Cluster.open(Layout.of(parallel)) as cluster:
        for case, changes in CASES.items():
            watch = Watch()
            config = tied_config(
                folder / f"{layout} {case}",
                parallel=parallel,
                optimizer=still,
                iterations=2,
                checkpoint_every=9,
                **changes,
            )
            reward = sometimes_dropped if "reward" in changes else has_vowel_early
            with tied_trainer(config, [watch], reward, num_hidden_layers=4) as run:
                steps = [step_metrics(run.step()) for _ in range(2)]
                weights = tiny.by_hugging_face_name(run.actor, lambda p: p)
            results[case] = (watch.tokens, steps, weights, watch.groups_on_several_ranks, watch.own_moments)
        if cluster.is_main:
            torch.save(results, folder / f"{layout}.pt")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    launch(1, runs, folder, "one")
    return torch.load(folder / "one.pt", weights_only=False)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2", *LONG])
def test_a_layout_is_the_same_run_as_one_process(layout, one, tmp_path):
    launch(LAYOUTS[layout][0], runs, tmp_path, layout, seconds=850)
    results = torch.load(tmp_path / f"{layout}.pt", weights_only=False)
    for case, (tokens, steps, weights, split, own_moments) in results.items():
        expected_tokens, expected_steps, expected_weights, *_ = one[case]
        assert tokens == expected_tokens, case
        for step, expected in zip(steps, expected_steps, strict=True):
            assert [step[n] for n in COUNTS] == [expected[n] for n in COUNTS], case
            for figure in FIGURES:
                assert step[figure] == pytest.approx(expected[figure], abs=1e-4), (case, figure)
            assert step["grad_norm_actor"] == pytest.approx(expected["grad_norm_actor"], rel=1e-4)
        assert tiny.gap(weights, expected_weights)[0] <= 1e-5, case
        # Moments of the ranks differ, so that global ones are merged from them.
        assert (split > 0) == own_moments == ("dp2" in layout), case


def test_the_cases_have_what_they_are_about(one):
    rows, selected = one["rloo, rows leave"][1], one["grpo, dynamic sampling"][1]
    assert all(0.1 < s["zero_advantage_fraction"] < 1 and s["dropped_responses"] > 0 for s in rows)
    assert any(s["skipped_prompts"] > 0 and s["sampling_rounds"] > 1 for s in selected)
