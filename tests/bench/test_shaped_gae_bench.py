"""The alternatives of the GAE bench form what the operation forms, and quick cases are cases of the whole run."""

import torch

from bench.kernels import bench_shaped_gae as bench


def streams(lengths):
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    torch.manual_seed(0)
    return [torch.randn(len(lengths)), *(torch.randn(int(cu[-1])) for _ in range(3)), cu]


def test_alternatives_with_returns_and_turns_agree_with_the_reference():
    drawn = [x.double() if x.is_floating_point() else x for x in streams([250, 1, 119, 121, 300])]
    for suffix, (keywords, alternatives) in bench.variants(drawn[-1]).items():
        truth = bench.both_of("reference", **keywords)(*drawn)
        assert alternatives, suffix
        for name, call in {**alternatives, "ours": bench.both_of("cpp", **keywords)}.items():
            assert bench.relative_error(call(*drawn), truth) < 1e-9, (suffix, name)


def test_the_error_sees_a_wrong_return():
    drawn = streams([30, 40])
    advantage, returns = bench.both_of("reference")(*drawn)
    assert bench.relative_error((advantage, returns + 1.0), (advantage, returns)) > 1e-3


def test_every_sequence_begins_with_a_turn_and_turns_have_gaps():
    mask = bench.turn_mask(torch.tensor([0, 250, 251, 500]))
    assert mask[[0, 99, 120, 250, 251]].all() and not mask[[100, 119, 220, 351]].any()


def test_quick_cases_are_cases_of_the_whole_run():
    quick, whole = dict(bench.cases(True)), dict(bench.cases(False))
    assert set(quick) < set(whole)
    assert all(torch.equal(lengths, whole[name]) for name, lengths in quick.items())
