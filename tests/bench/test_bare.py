"""The bare passes that the reference path is timed against compute the same gradients."""

import torch

from bench.end_to_end.workloads import workload_of
from bench.reference_ppo.bench_bare import TOLERANCE, Case, passes, relative_gap

SMALL = workload_of("uniform,layers=2,width=32,mlp=48,heads=4,kv_heads=2,vocab=64,prompts=5,answer_tokens=6")


def test_reference_path_and_bare_transformers_have_equal_gradients():
    case = Case.of(SMALL, 4)
    assert len(case.batch.members) == 4 and not bool(case.batch.attention_NL.all())
    for calls, expected in passes(case).values():
        assert len(expected) > 10 and max(float(g.abs().max()) for g in expected) > 1e-3
        gaps = {name: relative_gap(run(), expected) for name, run in calls.items()}
        assert set(gaps) == {"reference path", "bare transformers"} and max(gaps.values()) < TOLERANCE / 10


def test_other_advantages_have_other_gradients():
    case = Case.of(SMALL, 4)
    calls, expected = passes(case)["actor"]
    case.advantages[0] = case.advantages[0] + 0.1
    assert all(relative_gap(run(), expected) > 10 * TOLERANCE for run in calls.values())


def test_the_gap_is_relative_to_all_gradients():
    expected = [torch.tensor([3.0]), torch.tensor([4.0])]
    assert relative_gap([torch.tensor([3.0]), torch.tensor([4.5])], expected) == 0.1
