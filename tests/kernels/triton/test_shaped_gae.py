"""shaped_gae in Triton under the interpreter.

The interpreter runs a scan element by element, so tiles are small here: carries still cross lanes, rows, programs and
groups of chunks. The sizes that are launched on a device are in tests/gpu and compiled ahead of time.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icegrt.kernels import record_launches, shaped_gae, use_backend
from icegrt.kernels.validate import KL_ESTIMATORS
from tests.helpers.kernel_cases import (
    assert_within_budget,
    check_filtered_tokens,
    drawn_lambdas,
    drawn_mask,
    gae_streams,
    module_constants,
    naive_gae,
    widen,
    worst,
)
from tests.helpers.threaded_interpreter import programs_in_threads

RESULTS = ("advantage_A", "return_A", "reward_A", "kl_N")
SMALL = {"ROWS": 2, "CHUNK": 4, "LOOKBACK": 4, "FANOUT": 4}


def triton_gae(*streams, sizes=SMALL, **options):
    with use_backend("triton"), record_launches() as launches, module_constants("shaped_gae", **sizes):
        out = shaped_gae(*streams, **options)
    assert launches == [("shaped_gae_kernel", "triton")]
    return out


def check_error_budget(lengths, masked=False, slack=3, seed=0, sizes=SMALL, lam=0.9, lam_value=None, unit="token"):
    """Lambdas are numbers, None, or "each": one per sequence."""
    streams = gae_streams(lengths, slack, seed=seed)
    size, cu_actions = streams[1].shape[0], streams[4]
    mask = drawn_mask(cu_actions, size) if masked else None
    token_reward, bootstrap = torch.randn(size), torch.randn(len(lengths))
    lam, lam_value = (drawn_lambdas(len(lengths), i) if x == "each" else x for i, x in enumerate((lam, lam_value)))
    options = {"kl_coef": 0.1, "gamma": 0.99, "lam": lam, "lam_value": lam_value, "unit": unit}
    truths = naive_gae(*widen(streams), **options, bootstrap=bootstrap, mask=mask, token_reward=token_reward)
    options |= {"bootstrap_N": bootstrap, "mask_A": mask, "token_reward_A": token_reward}
    fused = triton_gae(*streams, sizes=sizes, **options)
    with use_backend("reference"):
        plain = shaped_gae(*streams, **options)
    for name, truth in zip(RESULTS, truths, strict=True):
        assert_within_budget(getattr(fused, name), getattr(plain, name), truth, 1e-5)
    if unit == "turn":
        assert torch.equal(fused.value_mask_A, plain.value_mask_A)
    assert fused.moments.count == plain.moments.count
    assert worst(fused.moments.mean, plain.moments.mean) < 1e-5
    torch.testing.assert_close(fused.moments.m2, plain.moments.m2, rtol=1e-5, atol=1e-5)
    end = int(cu_actions[-1])
    assert (fused.advantage_A[end:] == 0).all() and (fused.return_A[end:] == 0).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("lengths", [[3, 0, 1, 25, 8, 9], [70], [1]], ids=str)
def test_error_budget_over_rows_programs_and_groups(lengths, masked):
    check_error_budget(lengths, masked)


@pytest.mark.parametrize("unit", ["token", "turn"])
@pytest.mark.parametrize("lambdas", [(0.9, 1.0), ("each", None), ("each", "each")], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_error_budget_of_two_lambdas_and_of_turns(masked, lambdas, unit):
    check_error_budget([3, 0, 1, 25, 8, 9], masked, lam=lambdas[0], lam_value=lambdas[1], unit=unit)


def test_a_turn_over_many_rows_programs_and_groups():
    check_error_budget([2, 70, 0, 5], unit="turn")


@pytest.mark.parametrize("options", [{}, {"lam_value": "each", "unit": "turn"}], ids=str)
def test_error_budget_with_the_tiles_of_a_device(options):
    check_error_budget([3, 0, 140], sizes={}, **options)


@given(
    lengths=st.lists(st.integers(0, 30), max_size=6),
    masked=st.booleans(),
    slack=st.integers(0, 9),
    lam_value=st.sampled_from([None, 1.0, "each"]),
    unit=st.sampled_from(["token", "turn"]),
)
@settings(max_examples=12)
def test_error_budget_of_drawn_lengths(lengths, masked, slack, lam_value, unit):
    check_error_budget(lengths, masked, slack, lam_value=lam_value, unit=unit)


def check_many_sequences_of_one_token(N=300):
    check_error_budget([1] * N, slack=0)


def test_many_sequences_of_one_token():
    check_many_sequences_of_one_token()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_estimators_extreme_and_tiny_differences(estimator):
    score, zeros, cu_actions = torch.zeros(1), torch.zeros(8), torch.tensor([0, 8], dtype=torch.int32)
    logprob = torch.tensor([-100.0, 0.0, 100.0, 1e-3, -1e-3, 0.49, -0.51, 3.0])
    options = {"kl_coef": 1.0, "kl_estimator": estimator, "lam": 0.0, "gamma": 0.0}
    fused = triton_gae(score, zeros, logprob, zeros, cu_actions, **options)
    truth = shaped_gae(score, zeros, logprob.double(), zeros, cu_actions, **options)
    assert torch.isfinite(fused.reward_A).all()
    torch.testing.assert_close(fused.reward_A.double(), truth.reward_A, rtol=3e-5, atol=0)


def check_masked_nan_does_not_leak(**options):
    streams = gae_streams([6, 6])
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1, 0], dtype=torch.bool)
    clean = triton_gae(*streams, kl_coef=0.1, mask_A=mask, **options)
    for stream in streams[1:4]:
        stream[~mask] = torch.nan
    dirty = triton_gae(*streams, kl_coef=0.1, mask_A=mask, **options)
    for name in RESULTS:
        assert torch.equal(getattr(clean, name), getattr(dirty, name))


@pytest.mark.parametrize("options", [{}, {"lam_value": 1.0, "unit": "turn"}], ids=str)
def test_nan_in_masked_positions_does_not_leak(options):
    check_masked_nan_does_not_leak(**options)


def check_a_tail_that_is_masked():
    """The score belongs to the last unmasked action, whole chunks and programs before the end."""
    zeros, mask, cu_actions = torch.zeros(40), torch.arange(40) < 7, torch.tensor([0, 40])
    out = triton_gae(torch.tensor([2.0]), zeros, zeros, zeros, cu_actions, kl_coef=0.0, lam=1.0, mask_A=mask)
    assert out.reward_A.nonzero().tolist() == [[6]] and out.reward_A[6] == 2
    assert out.advantage_A.tolist() == [2.0] * 7 + [0.0] * 33


def test_the_score_lands_on_the_last_unmasked_action():
    check_a_tail_that_is_masked()


def check_a_score_without_an_action():
    zeros, cu_actions = torch.zeros(5), torch.tensor([0, 5, 5])
    with pytest.raises(ValueError, match=r"got 0\.5 at sequence 1"):
        triton_gae(torch.tensor([1.0, 0.5]), zeros, zeros, zeros, cu_actions, kl_coef=0.0)


def test_a_score_without_an_action_is_refused():
    check_a_score_without_an_action()


def check_bits_alone_and_in_a_batch(**options):
    streams, options = gae_streams([11, 50, 7]), options | {"kl_coef": torch.tensor(0.1)}
    batched = triton_gae(*streams, **options)
    assert torch.equal(batched.advantage_A, triton_gae(*streams, **options).advantage_A)
    actions = slice(11, 61)
    sequence = [streams[0][1:2], *(stream[actions] for stream in streams[1:4]), torch.tensor([0, 50])]
    alone = triton_gae(*sequence, **options)
    assert torch.equal(batched.advantage_A[actions], alone.advantage_A) and batched.kl_N[1] == alone.kl_N[0]
    assert torch.equal(batched.return_A[actions], alone.return_A)


@pytest.mark.parametrize("options", [{}, {"lam_value": 1.0}, {"lam_value": 1.0, "unit": "turn"}], ids=str)
def test_bits_alone_and_in_a_batch(options):
    check_bits_alone_and_in_a_batch(**options)


@pytest.mark.parametrize("unit", ["token", "turn"])
def test_one_lambda_in_any_form_gives_the_same_bits(unit):
    """A second recursion changes no bit of the first, and has its bits if the lambdas are equal."""
    streams = gae_streams([6, 0, 9, 1, 33], slack=2)
    plain, each = triton_gae(*streams, kl_coef=0.1, lam=0.9, unit=unit), torch.full((5,), 0.9)
    for lambdas in ({"lam": 0.9, "lam_value": 0.9}, {"lam": each}, {"lam": each, "lam_value": each}):
        out = triton_gae(*streams, kl_coef=0.1, unit=unit, **lambdas)
        assert torch.equal(out.advantage_A, plain.advantage_A) and torch.equal(out.return_A, plain.return_A)


def test_views_and_empty_streams():
    columns = torch.randn(20, 2)
    strided = [torch.zeros(1), columns[:, 0], columns[:, 1], columns[:, 0], torch.tensor([0, 20])]
    dense = [stream.contiguous() for stream in strided]
    assert torch.equal(triton_gae(*strided, kl_coef=0.1).advantage_A, triton_gae(*dense, kl_coef=0.1).advantage_A)
    nothing = torch.zeros(0)
    for options in ({}, {"lam": nothing, "lam_value": 1.0, "unit": "turn"}):
        empty = triton_gae(*[nothing] * 4, torch.zeros(1, dtype=torch.int32), kl_coef=0.1, **options)
        assert empty.moments.count == 0 and empty.kl_N.shape == (0,)
    lambdas = torch.rand(1, 2)[:, 1]
    with_views = triton_gae(*strided, kl_coef=0.1, lam=lambdas, unit="turn")
    assert torch.equal(with_views.return_A, triton_gae(*dense, kl_coef=0.1, lam=float(lambdas), unit="turn").return_A)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_filtered_tokens_have_the_kl_of_kl_divergence(estimator):
    """A log-prob of -inf, of the policy, the reference or both, gives a finite KL."""
    with use_backend(shaped_gae="triton"), module_constants("shaped_gae", **SMALL):
        check_filtered_tokens(estimator)


def test_a_coefficient_of_zero_takes_the_penalty_out_even_where_it_is_not_finite():
    zeros = torch.zeros(2)
    out = triton_gae(zeros[:1], zeros, zeros, zeros + torch.nan, torch.tensor([0, 2]), kl_coef=0.0)
    assert (out.reward_A == 0).all() and out.kl_N.isnan().all()


def check_programs_in_threads(lengths, **options):
    """Whichever order programs run in, they wait for the maps that they need."""
    for seed in range(2):
        with programs_in_threads(seed):
            check_error_budget(lengths, seed=seed, **options)


@pytest.mark.parametrize("options", [{}, {"lam_value": 1.0}, {"lam_value": 1.0, "unit": "turn"}], ids=str)
def test_programs_in_threads(options):
    check_programs_in_threads([40, 3, 0, 25], masked=True, **options)


def test_a_turn_over_programs_in_threads():
    check_programs_in_threads([60], unit="turn")
