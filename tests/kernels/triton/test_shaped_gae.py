"""shaped_gae in Triton under the interpreter.

The interpreter runs a scan element by element, so tiles are small here: carries still cross lanes, rows, programs and
groups of chunks. The sizes that are launched on a device are in tests/gpu and compiled ahead of time.
"""

import contextlib
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icegrt.kernels import dispatch, record_launches, shaped_gae, use_backend
from tests.helpers.kernel_cases import assert_within_budget, naive_gae, worst

RESULTS = ("advantage_A", "return_A", "reward_A", "kl_N")
SMALL = {"ROWS": 2, "CHUNK": 4, "LOOKBACK": 4, "FANOUT": 4}


def batch(lengths, slack=0, seed=0):
    torch.manual_seed(seed)
    cu = torch.tensor([0, *torch.tensor(lengths, dtype=torch.long).cumsum(0).tolist()], dtype=torch.int32)
    size = int(cu[-1]) + slack
    score = torch.where(cu.diff() > 0, torch.randn(len(lengths)), 0.0)
    return score, torch.randn(size), torch.randn(size), torch.randn(size), cu


@contextlib.contextmanager
def tile(sizes):
    """Other tile sizes than the module's, in whichever module dispatch would load now."""
    module = vars(sys.modules[dispatch._load("shaped_gae", "triton").__module__])
    saved = {name: module[name] for name in sizes}
    module.update(sizes)
    try:
        yield
    finally:
        module.update(saved)


def triton_gae(*streams, sizes=SMALL, **options):
    with use_backend("triton"), record_launches() as launches, tile(sizes):
        out = shaped_gae(*streams, **options)
    assert launches == [("shaped_gae_kernel", "triton")]
    return out


def check_error_budget(lengths, masked=False, slack=3, seed=0, sizes=SMALL):
    streams = batch(lengths, slack, seed)
    size, cu = streams[1].shape[0], streams[4]
    mask = None
    if masked:
        mask = torch.rand(size) > 0.4
        mask[cu[:-1][cu.diff() > 0].long()] = True
    extra, bootstrap = torch.randn(size), torch.randn(len(lengths))
    options = {"kl_coef": 0.1, "gamma": 0.99, "lam": 0.9}
    wide = [x.double() if x.is_floating_point() else x for x in streams]
    truth = naive_gae(*wide, **options, bootstrap=bootstrap, mask=mask, token_reward=extra)
    options |= {"bootstrap_N": bootstrap, "mask_A": mask, "token_reward_A": extra}
    ours = triton_gae(*streams, sizes=sizes, **options)
    with use_backend("reference"):
        plain = shaped_gae(*streams, **options)
    for name, exact in zip(RESULTS, truth, strict=True):
        assert_within_budget(getattr(ours, name), getattr(plain, name), exact, 1e-5)
    assert ours.moments.count == plain.moments.count
    assert worst(ours.moments.mean, plain.moments.mean) < 1e-5
    torch.testing.assert_close(ours.moments.m2, plain.moments.m2, rtol=1e-5, atol=1e-5)
    assert (ours.advantage_A[int(cu[-1]) :] == 0).all() and (ours.return_A[int(cu[-1]) :] == 0).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", [[3, 0, 1, 25, 8, 9], [70], [1]], ids=str)
def test_error_budget_over_rows_programs_and_groups(lengths, masked):
    check_error_budget(lengths, masked)


def test_error_budget_with_the_tiles_of_a_device():
    check_error_budget([3, 0, 140], sizes={})


@given(lengths=st.lists(st.integers(0, 30), max_size=6), masked=st.booleans(), slack=st.integers(0, 9))
@settings(max_examples=8)
def test_error_budget_of_drawn_lengths(lengths, masked, slack):
    check_error_budget(lengths, masked, slack)


def check_many_sequences_of_one_token(N=300):
    check_error_budget([1] * N, slack=0)


def test_many_sequences_of_one_token():
    check_many_sequences_of_one_token()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_estimators_extreme_and_tiny_differences(estimator):
    score, value, _, _, cu = batch([8])
    value, score = torch.zeros(8), torch.zeros(1)
    d = torch.tensor([-100.0, 0.0, 100.0, 1e-3, -1e-3, 0.49, -0.51, 3.0])
    options = {"kl_coef": 1.0, "kl_estimator": estimator, "lam": 0.0, "gamma": 0.0}
    ours = triton_gae(score, value, d, torch.zeros(8), cu, **options)
    truth = shaped_gae(score, value, d.double(), torch.zeros(8), cu, **options)
    assert torch.isfinite(ours.reward_A).all()
    torch.testing.assert_close(ours.reward_A.double(), truth.reward_A, rtol=3e-5, atol=0)


def check_masked_nan_does_not_leak():
    streams = batch([6, 6])
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1, 0], dtype=torch.bool)
    clean = triton_gae(*streams, kl_coef=0.1, mask_A=mask)
    for x in streams[1:4]:
        x[~mask] = torch.nan
    dirty = triton_gae(*streams, kl_coef=0.1, mask_A=mask)
    for name in RESULTS:
        assert torch.equal(getattr(clean, name), getattr(dirty, name))


def test_nan_in_masked_positions_does_not_leak():
    check_masked_nan_does_not_leak()


def check_a_tail_that_is_masked():
    """The score belongs to the last unmasked action, whole chunks and programs before the end."""
    none, mask = torch.zeros(40), torch.arange(40) < 7
    out = triton_gae(torch.tensor([2.0]), none, none, none, torch.tensor([0, 40]), kl_coef=0.0, lam=1.0, mask_A=mask)
    assert out.reward_A.nonzero().tolist() == [[6]] and out.reward_A[6] == 2
    assert out.advantage_A.tolist() == [2.0] * 7 + [0.0] * 33


def test_the_score_lands_on_the_last_unmasked_action():
    check_a_tail_that_is_masked()


def check_a_score_without_an_action():
    none, cu = torch.zeros(5), torch.tensor([0, 5, 5])
    with pytest.raises(ValueError, match=r"got 0\.5 at sequence 1"):
        triton_gae(torch.tensor([1.0, 0.5]), none, none, none, cu, kl_coef=0.0)


def test_a_score_without_an_action_is_refused():
    check_a_score_without_an_action()


def check_bits_alone_and_in_a_batch():
    streams = batch([11, 50, 7])
    whole = triton_gae(*streams, kl_coef=torch.tensor(0.1))
    again = triton_gae(*streams, kl_coef=torch.tensor(0.1))
    assert torch.equal(whole.advantage_A, again.advantage_A)
    part = slice(11, 61)
    alone = triton_gae(
        streams[0][1:2], *[x[part] for x in streams[1:4]], torch.tensor([0, 50]), kl_coef=torch.tensor(0.1)
    )
    assert torch.equal(whole.advantage_A[part], alone.advantage_A) and whole.kl_N[1] == alone.kl_N[0]


def test_bits_alone_and_in_a_batch():
    check_bits_alone_and_in_a_batch()


def test_views_and_empty_streams():
    wide = torch.randn(20, 2)
    streams = [torch.zeros(1), wide[:, 0], wide[:, 1], wide[:, 0], torch.tensor([0, 20])]
    dense = [x.contiguous() for x in streams]
    assert torch.equal(triton_gae(*streams, kl_coef=0.1).advantage_A, triton_gae(*dense, kl_coef=0.1).advantage_A)
    none = torch.zeros(0)
    empty = triton_gae(none, none, none, none, torch.zeros(1, dtype=torch.int32), kl_coef=0.1)
    assert empty.moments.count == 0 and empty.kl_N.shape == (0,)
