"""shaped_gae: against a loop over tokens in fp64, with masks, slack, bootstraps, and NaN where nothing may read it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icegrt.kernels import available_backends, masked_moments, record_launches, shaped_gae, use_backend
from icegrt.kernels.validate import KL_ESTIMATORS
from tests.helpers.kernel_cases import (
    assert_within_budget,
    check_filtered_tokens,
    drawn_lambdas,
    drawn_mask,
    gae_streams,
    naive_gae,
    widen,
    worst,
)

# Triton has its own tests: tests/kernels/triton/test_shaped_gae.py.
BACKENDS = [backend for backend in available_backends("shaped_gae") if backend != "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(shaped_gae=request.param):
        yield request.param


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=7),
    slack=st.integers(0, 3),
    masked=st.booleans(),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0, "each"]),
    lam_value=st.sampled_from([None, 0.0, 0.8, 1.0, "each"]),
    unit=st.sampled_from(["token", "turn"]),
)
def test_against_the_loop_over_units(lengths, slack, masked, gamma, lam, lam_value, unit):
    streams = gae_streams(lengths, slack, torch.float64)
    size, cu_actions = streams[1].shape[0], streams[4]
    mask = drawn_mask(cu_actions, size) if masked else None
    bootstrap, token_reward = torch.randn(len(lengths)).double(), torch.randn(size).double()
    lam, lam_value = (
        drawn_lambdas(len(lengths), seed).double() if x == "each" else x for seed, x in enumerate((lam, lam_value))
    )
    options = {"kl_coef": 0.1, "gamma": gamma, "lam": lam, "lam_value": lam_value, "unit": unit}
    truths = naive_gae(*streams, **options, bootstrap=bootstrap, mask=mask, token_reward=token_reward)
    counted = torch.arange(size) < int(cu_actions[-1])
    counted = counted if mask is None else counted & mask
    for backend in BACKENDS:
        with use_backend(shaped_gae=backend):
            out = shaped_gae(*streams, **options, bootstrap_N=bootstrap, mask_A=mask, token_reward_A=token_reward)
        for name, truth in zip(("advantage_A", "return_A", "reward_A", "kl_N"), truths, strict=True):
            assert worst(getattr(out, name), truth) < 1e-10, (backend, name)
        moments = masked_moments(out.advantage_A[counted])
        assert out.moments.count == moments.count
        torch.testing.assert_close(out.moments.mean, moments.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(out.moments.m2, moments.m2, rtol=1e-12, atol=1e-12)
        assert (out.value_mask_A is None) is (unit == "token")


@pytest.mark.parametrize("unit", ["token", "turn"])
@pytest.mark.parametrize("masked", [False, True])
def test_one_lambda_in_any_form_gives_the_same_bits(backend, unit, masked):
    """Without lam_value, with an equal lam_value, and with lambdas of the sequences that are all equal."""
    streams = gae_streams([6, 0, 9, 1, 33], slack=2)
    options = {"kl_coef": 0.1, "unit": unit, "mask_A": drawn_mask(streams[4], 51) if masked else None}
    each = torch.full((5,), 0.9)
    plain = shaped_gae(*streams, **options, lam=0.9)
    if unit == "token":
        counted = plain.return_A != 0
        assert torch.equal(plain.return_A, torch.where(counted, plain.advantage_A + streams[1], 0.0))
    for lambdas in ({"lam": 0.9, "lam_value": 0.9}, {"lam": each}, {"lam": each, "lam_value": each}):
        out = shaped_gae(*streams, **options, **lambdas)
        for name in ("advantage_A", "return_A"):
            if backend == "reference" and lambdas["lam"] is each:
                # The reference squares a number in fp64, a tensor in its own dtype.
                torch.testing.assert_close(getattr(out, name), getattr(plain, name), rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(getattr(out, name), getattr(plain, name))
    other = shaped_gae(*streams, **options, lam=0.9, lam_value=1.0)
    assert torch.equal(other.advantage_A, plain.advantage_A)
    # Without a mask every sequence is one turn, which no lambda reaches.
    assert torch.equal(other.return_A, plain.return_A) is (unit == "turn" and not masked)


def test_returns_at_lambda_1_are_the_rewards_that_follow(backend):
    score, value, logprob, ref, cu_actions = gae_streams([4, 3], dtype=torch.float64)
    out = shaped_gae(score, value, logprob, ref, cu_actions, kl_coef=0.1, lam=0.5, lam_value=1.0)
    for rows in (slice(0, 4), slice(4, 7)):
        torch.testing.assert_close(out.return_A[rows], out.reward_A[rows].flip(0).cumsum(0).flip(0))


def test_turns_by_hand(backend):
    """Two turns, parted by two observation tokens; then a sequence that is one turn."""
    reward, value = torch.tensor([1.0, 2, 9, 9, 4, 5, 7]), torch.tensor([10.0, 99, 99, 99, 20, 99, 30])
    mask, zeros = torch.tensor([1, 1, 0, 0, 1, 1, 1]), torch.zeros(7)
    out = shaped_gae(
        torch.tensor([100.0, 0.0]),
        value,
        zeros,
        zeros,
        torch.tensor([0, 6, 7]),
        kl_coef=0.0,
        gamma=0.5,
        lam=0.5,
        lam_value=1.0,
        unit="turn",
        mask_A=mask,
        token_reward_A=reward,
    )
    # The second turn: 4 + 5 + 100 - 20 = 89. The first: 1 + 2 + 0.5 * 20 - 10 = 3, and 0.25 or 0.5 of 89.
    assert out.advantage_A.tolist() == [25.25, 25.25, 0, 0, 89, 89, -23]
    assert out.return_A.tolist() == [57.5, 0, 0, 0, 109, 0, 7]
    assert out.reward_A.tolist() == [1, 2, 0, 0, 4, 105, 7]
    assert out.value_mask_A.tolist() == [True, False, False, False, True, False, True]
    moments = masked_moments(out.advantage_A, mask)
    assert out.moments.count == 5
    torch.testing.assert_close([out.moments.mean, out.moments.m2], [moments.mean, moments.m2], rtol=1e-12, atol=0)


def test_turns_of_one_token_are_tokens(backend):
    streams = gae_streams([9, 4], dtype=torch.float64)
    mask = torch.tensor([1, 0] * 4 + [1] + [0, 1, 0, 1])
    options = {"kl_coef": 0.1, "gamma": 0.9, "lam_value": 1.0, "mask_A": mask}
    token, turn = (shaped_gae(*streams, **options, unit=unit) for unit in ("token", "turn"))
    for name in ("advantage_A", "return_A", "reward_A"):
        torch.testing.assert_close(getattr(turn, name), getattr(token, name), rtol=1e-12, atol=1e-12)
    assert torch.equal(turn.value_mask_A, mask.bool())


def test_score_lands_on_the_last_unmasked_action(backend):
    zeros = torch.zeros(6)
    mask = torch.tensor([1, 1, 0, 1, 0, 0])
    out = shaped_gae(torch.tensor([2.0, 3.0]), zeros, zeros, zeros, torch.tensor([0, 3, 6]), kl_coef=0.5, mask_A=mask)
    assert out.reward_A.tolist() == [0, 2, 0, 3, 0, 0]


def test_truncated_responses_bootstrap_and_finished_ones_do_not(backend):
    zeros = torch.zeros(4)
    cu_actions = torch.tensor([0, 2, 4])
    out = shaped_gae(
        torch.zeros(2), zeros, zeros, zeros, cu_actions, kl_coef=0.0, lam=1.0, bootstrap_N=torch.tensor([5.0, 0.0])
    )
    assert out.return_A.tolist() == [5, 5, 0, 0]


def test_masked_entries_carry_the_recursion_through_unchanged(backend):
    streams = gae_streams([6, 5], dtype=torch.float64)
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1, 0, 0, 1, 1], dtype=torch.bool)
    score, value, logprob, ref, _ = streams
    out = shaped_gae(*streams, kl_coef=0.1, gamma=0.9, mask_A=mask)
    dropped = shaped_gae(score, value[mask], logprob[mask], ref[mask], torch.tensor([0, 4, 7]), kl_coef=0.1, gamma=0.9)
    if backend == "reference":
        assert torch.equal(out.advantage_A[mask], dropped.advantage_A) and torch.equal(out.kl_N, dropped.kl_N)
    for name in ("advantage_A", "return_A", "reward_A"):
        torch.testing.assert_close(getattr(out, name)[mask], getattr(dropped, name), rtol=1e-12, atol=1e-12)
    assert (out.advantage_A[~mask] == 0).all() and (out.return_A[~mask] == 0).all()
    assert out.moments.count == 7


@pytest.mark.parametrize("options", [{}, {"lam_value": 1.0}, {"lam_value": 1.0, "unit": "turn"}], ids=str)
def test_nan_and_infinity_where_masked_or_slack_do_not_leak(backend, options):
    streams = gae_streams([6, 5], slack=3, dtype=torch.float64)
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 1], dtype=torch.bool)
    clean = shaped_gae(*streams, kl_coef=0.1, mask_A=mask, **options)
    counted = mask & (torch.arange(14) < 11)
    dirty_streams = [torch.where(counted, x, torch.nan) for x in streams[1:4]]
    dirty = shaped_gae(streams[0], *dirty_streams, streams[4], kl_coef=0.1, mask_A=mask, **options)
    for name in ("advantage_A", "return_A", "reward_A", "kl_N"):
        assert torch.equal(getattr(clean, name), getattr(dirty, name))
        assert torch.isfinite(getattr(dirty, name)).all()


def test_a_score_without_an_action_is_refused_and_a_zero_score_is_not(backend):
    zeros, cu_actions = torch.zeros(2), torch.tensor([0, 2, 2])
    with pytest.raises(ValueError, match=r"score_N must be 0 .* got 0.5 at sequence 1"):
        shaped_gae(torch.tensor([1.0, 0.5]), zeros, zeros, zeros, cu_actions, kl_coef=0.0)
    with pytest.raises(ValueError, match="sequence 0"):
        shaped_gae(torch.tensor([1.0, 0.0]), zeros, zeros, zeros, cu_actions, kl_coef=0.0, mask_A=torch.zeros(2))
    assert shaped_gae(torch.tensor([1.0, 0.0]), zeros, zeros, zeros, cu_actions, kl_coef=0.0).kl_N.tolist() == [0, 0]


def test_kl_is_reported_unscaled_and_inputs_are_left_alone(backend):
    streams = gae_streams([4, 3])
    originals = [stream.clone() for stream in streams]
    out = shaped_gae(*streams, kl_coef=torch.tensor(0.3), kl_estimator="k3")
    for stream, original in zip(streams, originals, strict=True):
        assert torch.equal(stream, original)
    unpenalized = shaped_gae(*streams, kl_coef=0.0, kl_estimator="k3")
    assert torch.equal(out.kl_N, unpenalized.kl_N) and (out.kl_N > 0).all()
    assert out.advantage_A.dtype == out.reward_A.dtype == torch.float32 and not out.advantage_A.requires_grad


def test_a_coefficient_of_zero_takes_the_penalty_out_even_where_it_is_not_finite(backend):
    zeros = torch.zeros(2)
    out = shaped_gae(zeros[:1], zeros, zeros, zeros + torch.nan, torch.tensor([0, 2]), kl_coef=0.0)
    assert (out.reward_A == 0).all() and out.kl_N.isnan().all()


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_filtered_tokens_have_the_kl_of_kl_divergence(backend, estimator):
    """A log-prob of -inf, of the policy, the reference or both, gives a finite KL."""
    check_filtered_tokens(estimator)


def test_critic_returns_include_the_kl_like_the_advantages(backend):
    streams = gae_streams([5], dtype=torch.float64)
    out = shaped_gae(*streams, kl_coef=0.2)
    torch.testing.assert_close(out.return_A, out.advantage_A + streams[1])


def test_views_empty_and_very_many_sequences(backend):
    columns = torch.randn(20, 2)
    strided = [torch.zeros(1), columns[:, 0], columns[:, 1], columns[:, 0], torch.tensor([0, 20])]
    dense = [x.contiguous() for x in strided]
    assert torch.equal(shaped_gae(*strided, kl_coef=0.1).advantage_A, shaped_gae(*dense, kl_coef=0.1).advantage_A)
    zeros = torch.zeros(0)
    out = shaped_gae(zeros, zeros, zeros, zeros, torch.zeros(1, dtype=torch.int32), kl_coef=0.1)
    assert out.kl_N.shape == (0,) and out.moments.count == 0
    turns = shaped_gae(*[zeros] * 4, torch.zeros(1, dtype=torch.int32), kl_coef=0.1, lam=zeros, unit="turn")
    assert turns.value_mask_A.shape == (0,) and turns.moments.count == 0
    many = torch.ones(100_000)
    for options in ({}, {"lam": torch.rand(100_000, 2)[:, 1], "lam_value": 0.5, "unit": "turn"}):
        out = shaped_gae(many, many, many, many, torch.arange(100_001), kl_coef=0.1, **options)
        assert (out.return_A == 1).all()


def test_one_sequence_of_100k_tokens(backend):
    streams = gae_streams([100_000])
    out = shaped_gae(*streams, kl_coef=0.1, kl_estimator="k2", gamma=0.999, lam=0.97)
    with use_backend(shaped_gae="reference"):
        plain = shaped_gae(*streams, kl_coef=0.1, kl_estimator="k2", gamma=0.999, lam=0.97)
        truth = shaped_gae(*widen(streams), kl_coef=0.1, kl_estimator="k2", gamma=0.999, lam=0.97)
    for name in ("advantage_A", "return_A", "reward_A", "kl_N"):
        assert_within_budget(getattr(out, name), getattr(plain, name), getattr(truth, name), 1e-5)
    torch.testing.assert_close(out.moments.m2, truth.moments.m2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_estimators_of_extreme_differences(backend, estimator):
    logprob = torch.tensor([-100.0, 0.0, 100.0, 1e-3, -1e-3, 0.49, -0.51, 3.0])
    zeros = torch.zeros(8)
    options = {"kl_coef": 1.0, "kl_estimator": estimator, "gamma": 0.0}
    out = shaped_gae(zeros[:1], zeros, logprob, zeros, torch.tensor([0, 8]), **options)
    truth = shaped_gae(zeros[:1], zeros, logprob.double(), zeros, torch.tensor([0, 8]), **options)
    assert torch.isfinite(out.reward_A).all()
    torch.testing.assert_close(out.reward_A.double(), truth.reward_A, rtol=3e-5, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"lam_value": 1.0}, {"lam_value": 1.0, "unit": "turn"}], ids=str)
def test_bits_repeat_and_depend_on_neither_neighbours_nor_threads(options):
    if "cpp" not in BACKENDS:
        pytest.skip("icegrt._C is not installed")
    lengths = [40, 20_000, 1, 0, 33_333, 7]
    streams = gae_streams(lengths)
    threads = torch.get_num_threads()
    try:
        with use_backend(shaped_gae="cpp"), record_launches() as launches:
            batched = shaped_gae(*streams, kl_coef=0.1, **options)
            torch.set_num_threads(3)
            threaded = shaped_gae(*streams, kl_coef=0.1, **options)
            actions = slice(40, 20_040)
            sequence = [streams[0][1:2], *(x[actions] for x in streams[1:4]), torch.tensor([0, 20_000])]
            alone = shaped_gae(*sequence, kl_coef=0.1, **options)
    finally:
        torch.set_num_threads(threads)
    assert launches == [("shaped_gae", "cpp")] * 3
    assert torch.equal(batched.advantage_A, threaded.advantage_A) and batched.moments == threaded.moments
    assert torch.equal(batched.return_A, threaded.return_A)
    assert torch.equal(batched.advantage_A[actions], alone.advantage_A) and batched.kl_N[1] == alone.kl_N[0]
    assert torch.equal(batched.return_A[actions], alone.return_A)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_masks_that_are_numbers(backend, dtype):
    streams = [x.to(dtype) if x.is_floating_point() else x for x in gae_streams([5, 3], dtype=torch.float64)]
    mask = torch.tensor([2, 0, 1, 1, -1, 1, 1, 0])
    out = shaped_gae(*streams, kl_coef=torch.tensor(0.1), mask_A=mask)
    advantage, *_ = naive_gae(*widen(streams), kl_coef=torch.tensor(0.1).item(), gamma=1.0, lam=0.95, mask=mask)
    assert out.advantage_A.dtype == torch.float32
    assert worst(out.advantage_A, advantage) < 1e-5
    of_floats = shaped_gae(*streams, kl_coef=torch.tensor(0.1), mask_A=(mask != 0).to(dtype))
    assert torch.equal(of_floats.advantage_A, out.advantage_A)
    with pytest.raises(ValueError, match=r"mask_A must be 0 or 1 where it is floating point .* got 2.0 at row 0"):
        shaped_gae(*streams, kl_coef=torch.tensor(0.1), mask_A=mask.to(dtype))


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("cu_actions must have shape", {"cu_actions": torch.tensor([0, 1])}),
        ("cu_actions must start at 0", {"cu_actions": torch.tensor([0, 2, 1])}),
        ("cu_actions must start at 0", {"cu_actions": torch.tensor([0, 2, 4])}),
        ("ref_logprob_A must be given", {"ref_logprob_A": None}),
        ("gamma must be finite", {"gamma": 1.5}),
        ("lam must be finite", {"lam": -0.1}),
        ("lam_value must be finite", {"lam_value": 1.5}),
        ("lam must have shape", {"lam": torch.ones(3)}),
        (r"lam_value must be finite.*got 1\.5 at sequence 1", {"lam_value": torch.tensor([1.0, 1.5])}),
        (r"lam must be finite.*got nan at sequence 0", {"lam": torch.tensor([torch.nan, 0.5])}),
        ("unit must be one of token, turn", {"unit": "word"}),
        ("kl_estimator must be one of", {"kl_estimator": "k4"}),
    ],
)
def test_errors_name_the_argument(match, change):
    zeros = torch.zeros(3)
    arguments = {
        "score_N": torch.zeros(2),
        "value_A": zeros,
        "logprob_A": zeros,
        "ref_logprob_A": zeros,
        "kl_coef": 0.1,
    }
    with pytest.raises(ValueError, match=match):
        shaped_gae(**({"cu_actions": torch.tensor([0, 1, 3])} | arguments | change))


def test_wrong_dtypes_and_devices_are_refused_by_name():
    zeros, cu_actions = torch.zeros(3), torch.tensor([0, 3])
    arguments = {
        "score_N": zeros[:1],
        "value_A": zeros,
        "logprob_A": zeros,
        "ref_logprob_A": zeros,
        "cu_actions": cu_actions,
    }
    for name, wrong in (("value_A", zeros.long()), ("cu_actions", cu_actions.float()), ("ref_logprob_A", zeros.int())):
        with pytest.raises(TypeError, match=f"{name} must be"):
            shaped_gae(**(arguments | {name: wrong}), kl_coef=0.1)
    meta = torch.zeros(3, device="meta")
    for name in ("value_A", "logprob_A", "ref_logprob_A"):
        with pytest.raises(ValueError, match=f"{name} must be on cpu .* got meta"):
            shaped_gae(**(arguments | {name: meta}), kl_coef=0.1)
    with pytest.raises(ValueError, match="kl_coef must be a number or on cpu"):
        shaped_gae(**arguments, kl_coef=meta.sum())
