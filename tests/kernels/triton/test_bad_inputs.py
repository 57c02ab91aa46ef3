"""NaN, -inf and log-probs that are not finite: one rule for the reference, the chunks and the Triton kernels."""

import math

import pytest
import torch

from icegrt.kernels import (
    available_backends,
    kl_divergence,
    linear_logprobs,
    linear_ppo_loss,
    masked_moments,
    ppo_policy_loss,
    shaped_gae,
    token_logprobs,
    use_backend,
    value_loss,
    whiten,
)
from icegrt.kernels.ppo_policy_loss import inputs

NAN, INF = math.nan, math.inf
STREAM_BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])
LINEAR_BACKENDS = pytest.mark.parametrize("backend", ["reference", "chunked", "cpp", "triton"])
ESTIMATORS = ("k1", "k2", "k3", "abs")


def with_entry(x, row, value):
    """Return a copy of x whose entry `row` is `value`."""
    x = x.clone()
    x[row] = value
    return x


def policy_loss(backend, logprob, old, advantage, **options):
    leaf = logprob.clone().requires_grad_()
    with use_backend(backend):
        out = ppo_policy_loss(leaf, old, advantage, normalizer=2.0, **options)
        out.loss.backward()
    return out, leaf.grad


def linear_loss(backend, hidden, weight, labels, old, advantage, **options):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with use_backend(backend):
        out = linear_ppo_loss(hidden, weight, labels, old, advantage, normalizer=2.0, **options)
        out.loss.backward()
    return out, hidden.grad, weight.grad


def linear_problem():
    return torch.randn(4, 3), torch.randn(6, 3), torch.tensor([0, 5, 2, 1]), torch.full((4,), -1.5), torch.ones(4)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_old_logprobs_that_are_not_finite_are_refused_with_their_row(bad):
    old = with_entry(torch.full((4,), -1.0), 2, bad)
    message = rf"old_logprob_A must be finite where a token counts, got {bad} at row 2"
    with pytest.raises(ValueError, match=f"ppo_policy_loss: {message}"):
        ppo_policy_loss(torch.full((4,), -1.0), old, torch.ones(4), normalizer=1.0)
    masked = ppo_policy_loss(
        torch.full((4,), -1.0), old, torch.ones(4), normalizer=1.0, mask_A=torch.tensor([1, 1, 0, 1])
    )
    assert masked.loss == -3.0 and masked.stats.count == 3
    hidden, weight, labels, _, advantage = linear_problem()
    with pytest.raises(ValueError, match=f"linear_ppo_loss: {message}"):
        linear_ppo_loss(hidden, weight, labels, old, advantage, normalizer=1.0)
    ignored = linear_ppo_loss(hidden, weight, with_entry(labels, 2, -100), old, advantage, normalizer=1.0)
    assert ignored.loss.isfinite() and ignored.stats.count == 3


@pytest.fixture
def _as_on_a_device(monkeypatch):
    """Skip the check of values, which a device does not get: it would synchronise."""
    monkeypatch.setattr(inputs, "check_finite_rows", lambda *_: None)


@pytest.mark.usefixtures("_as_on_a_device")
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
class TestOldLogprobsThatNoCheckRefuses:
    @STREAM_BACKENDS
    def test_policy_loss_and_gradient_are_nan(self, backend, bad):
        old = with_entry(torch.full((4,), -1.0), 2, bad)
        for advantage in (1.0, -1.0):
            out, grad = policy_loss(backend, torch.full((4,), -1.0), old, torch.full((4,), advantage))
            assert out.loss.isnan() and grad.isnan().tolist() == [False, False, True, False]

    @LINEAR_BACKENDS
    def test_linear_loss_and_gradients_are_nan(self, backend, bad):
        hidden, weight, labels, old, advantage = linear_problem()
        out, hidden_grad, weight_grad = linear_loss(
            backend, hidden, weight, labels, with_entry(old, 2, bad), advantage, chunk_rows=2
        )
        assert out.loss.isnan() and weight_grad.isnan().all()
        assert hidden_grad.isnan().all(1).tolist() == [False, False, True, False]


@STREAM_BACKENDS
@pytest.mark.parametrize("stream", ["logprob", "advantage"])
def test_nan_that_counts_reaches_loss_and_gradient(backend, stream):
    streams = {"logprob": torch.full((4,), -1.2), "old": torch.full((4,), -1.0), "advantage": torch.ones(4)}
    streams[stream] = with_entry(streams[stream], 1, NAN)
    for options in ({}, {"dual_clip": 2.0}):
        out, grad = policy_loss(backend, *streams.values(), **options)
        assert out.loss.isnan() and grad.isnan().tolist() == [False, True, False, False]
    out, grad = policy_loss(backend, *streams.values(), mask_A=torch.tensor([1, 0, 1, 1]))
    assert out.loss.isfinite() and grad.isfinite().all()


@STREAM_BACKENDS
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_reference_of_nan_reaches_loss_and_gradient(backend, estimator):
    ref = with_entry(torch.full((4,), -1.0), 1, NAN)
    options = {"ref_logprob_A": ref, "kl_coef": 0.1, "kl_estimator": estimator}
    streams = (torch.full((4,), -1.2), torch.full((4,), -1.0), torch.ones(4))
    out, grad = policy_loss(backend, *streams, **options)
    assert out.loss.isnan() and grad.isnan().tolist() == [False, True, False, False]
    out, grad = policy_loss(backend, *streams, **options, mask_A=torch.tensor([1, 0, 1, 1]))
    assert out.loss.isfinite() and grad.isfinite().all()


@LINEAR_BACKENDS
def test_a_reference_of_nan_reaches_the_linear_loss_and_its_gradients(backend):
    problem = linear_problem()
    ref = with_entry(torch.full((4,), -1.0), 1, NAN)
    out, hidden_grad, weight_grad = linear_loss(backend, *problem, ref_logprob_A=ref, kl_coef=0.1, chunk_rows=2)
    assert out.loss.isnan() and weight_grad.isnan().all()
    assert hidden_grad.isnan().all(1).tolist() == [False, True, False, False]


@STREAM_BACKENDS
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_nan_reaches_the_gradient_of_an_estimator_that_is_not_linear(backend, estimator):
    leaf = torch.tensor([NAN, -1.0], requires_grad=True)
    with use_backend(backend):
        out = kl_divergence(leaf, torch.full((2,), -2.0), estimator)
    out.sum().backward()
    assert out.isnan().tolist() == [True, False] == leaf.grad.isnan().tolist()


@STREAM_BACKENDS
def test_nan_values_reach_the_value_loss_and_its_gradient(backend):
    leaf = torch.tensor([1.0, NAN, 2.0], requires_grad=True)
    with use_backend(backend):
        out = value_loss(leaf, torch.zeros(3), torch.ones(3), normalizer=1.0)
    out.loss.backward()
    assert out.loss.isnan() and leaf.grad.isnan().tolist() == [False, True, False]


@STREAM_BACKENDS
@pytest.mark.parametrize("clip", [0.2, None])
@pytest.mark.parametrize("stream", ["value", "old_value", "return"])
def test_nan_in_any_stream_of_the_value_loss_reaches_loss_and_gradient(backend, stream, clip):
    streams = {"value": torch.tensor([1.0, 0.5, 2.0]), "old_value": torch.zeros(3), "return": torch.ones(3)}
    streams[stream] = with_entry(streams[stream], 1, NAN)
    counts = stream != "old_value" or clip is not None  # without a clip no old value is read
    for mask, reaches in ((None, counts), (torch.tensor([1, 0, 1]), False)):
        leaf = streams["value"].clone().requires_grad_()
        old = None if clip is None else streams["old_value"]
        with use_backend(backend):
            out = value_loss(leaf, old, streams["return"], clip=clip, normalizer=1.0, mask_A=mask)
        out.loss.backward()
        assert out.loss.isnan() == reaches and leaf.grad.isnan().tolist() == [False, reaches, False]


@STREAM_BACKENDS
def test_nan_that_counts_reaches_moments_and_whitening(backend):
    x, mask = torch.tensor([1.0, NAN, 3.0]), torch.tensor([1, 0, 1])
    with use_backend(backend):
        counted, masked = masked_moments(x), masked_moments(x, mask)
        infinite = masked_moments(torch.tensor([1.0, INF]))
        white = whiten(x, masked)
        assert whiten(torch.ones(2), counted).isnan().all()
        bessel = whiten(torch.tensor([1.0, 3.0]), masked, correction=1)
    assert counted.count == 3 and counted.mean.isnan() and counted.m2.isnan() and counted.varies
    assert infinite.mean == INF and infinite.m2.isnan()
    assert (masked.count, masked.mean, masked.m2) == (2, 2.0, 2.0)
    torch.testing.assert_close(white, torch.tensor([-1.0, NAN, 1.0]), equal_nan=True)
    torch.testing.assert_close(bessel, torch.tensor([-1.0, 1.0]) / 2**0.5)


GAE_BACKENDS = pytest.mark.parametrize("backend", available_backends("shaped_gae"))


@GAE_BACKENDS
@pytest.mark.parametrize("stream", ["score", "value", "logprob", "ref_logprob", "token_reward", "bootstrap"])
def test_nan_that_counts_reaches_the_advantages_of_its_own_response(backend, stream):
    """It reaches the tokens up to its own, since advantages sum over later ones, and no other response."""
    streams = {name: torch.zeros(5) for name in ("value", "logprob", "ref_logprob", "token_reward")}
    streams |= {"score": torch.zeros(2), "bootstrap": torch.zeros(2)}
    streams[stream] = with_entry(streams[stream], 0 if stream in ("score", "bootstrap") else 1, NAN)
    score, bootstrap, token_reward = (streams.pop(name) for name in ("score", "bootstrap", "token_reward"))
    options = {"kl_coef": 0.1, "bootstrap_N": bootstrap, "token_reward_A": token_reward}
    with use_backend(shaped_gae=backend):
        out = shaped_gae(score, *streams.values(), torch.tensor([0, 3, 5]), **options)
    last = 2 if stream in ("score", "bootstrap") else 1
    assert out.advantage_A.isnan().tolist() == [t <= last for t in range(5)]
    assert out.moments.mean.isnan() and out.kl_N.isnan().tolist() == ["logprob" in stream, False]


MASKED_OPERATIONS = {
    "linear_logprobs": lambda mask: linear_logprobs(*linear_problem()[:3], mask_A=mask),
    "linear_ppo_loss": lambda mask: linear_ppo_loss(*linear_problem(), normalizer=1.0, mask_A=mask),
    "ppo_policy_loss": lambda mask: ppo_policy_loss(*torch.zeros(3, 4), normalizer=1.0, mask_A=mask),
    "value_loss": lambda mask: value_loss(*torch.zeros(3, 4), normalizer=1.0, mask_A=mask),
    "shaped_gae": lambda mask: shaped_gae(
        torch.zeros(1), *torch.zeros(3, 4), torch.tensor([0, 4]), kl_coef=0.0, mask_A=mask
    ),
    "masked_moments": lambda mask: masked_moments(torch.zeros(4), mask),
}


@pytest.mark.parametrize("operation", MASKED_OPERATIONS)
def test_float_masks_are_0_or_1(operation):
    compute = MASKED_OPERATIONS[operation]
    for bad in (0.5, -1.0, 2.0, NAN):
        with pytest.raises(ValueError, match=f"^{operation}: mask.* must be 0 or 1 .* got {bad} at row 2"):
            compute(torch.tensor([1.0, 0.0, bad, 1.0]))
    for mask in (torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([7, 0, -1, 1])):
        compute(mask)


@LINEAR_BACKENDS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("source", ["hidden", "advantage"])
def test_nan_that_counts_reaches_the_linear_loss_and_its_gradients(backend, temperature, source):
    """A row whose gradient is NaN is not a row without a gradient: it stays in the products."""
    hidden, weight, labels, old, advantage = linear_problem()
    if source == "hidden":
        hidden = with_entry(hidden, 1, NAN)
    else:
        advantage = with_entry(advantage, 1, NAN)
    for options in ({}, {"entropy_coef": 0.1}):
        out, hidden_grad, weight_grad = linear_loss(
            backend, hidden, weight, labels, old, advantage, chunk_rows=2, temperature=temperature, **options
        )
        assert out.loss.isnan() and weight_grad.isnan().all()
        assert hidden_grad.isnan().all(1).tolist() == [False, True, False, False]
        assert hidden_grad[[0, 2, 3]].isfinite().all()


@STREAM_BACKENDS
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("kl_gradient", ["k2", "raw"])
def test_a_filtered_token_has_ratio_0_and_no_gradient(backend, advantage, kl_gradient):
    """Its log-prob is -inf. Its loss is that of a ratio of 0: 0, or 0.8 of the advantage where the clip acts."""
    logprob, old = torch.tensor([-1.0, -INF]), torch.full((2,), -1.0)
    out, grad = policy_loss(backend, logprob, old, torch.full((2,), advantage))
    assert out.loss.item() == pytest.approx((-1.0 if advantage > 0 else 1.0 + 0.8) / 2)
    assert grad.tolist() == [-advantage / 2, 0.0]
    assert out.stats.ratio_min == 0 and out.stats.ratio_max == 1 and out.stats.ratio_sum == 1
    # (ratio - 1) - log ratio, with -1e4 for the log-prob of -inf
    assert out.stats.kl_old_new_sum.item() == pytest.approx(9998.0)
    for estimator in ESTIMATORS:
        options = {"kl_coef": 0.1, "kl_estimator": estimator, "kl_gradient": kl_gradient}
        out, grad = policy_loss(
            backend, logprob, old, torch.ones(2), ref_logprob_A=torch.tensor([-1.0, -2.0]), **options
        )
        assert out.loss.isfinite() and grad.isfinite().all() and grad[1] == 0
        assert all(value.isfinite() for value in vars(out.stats).values())


@STREAM_BACKENDS
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators_of_filtered_tokens_stay_finite(backend, estimator):
    logprob = torch.tensor([-INF, -1.0, -INF, -1.0], requires_grad=True)
    ref = torch.tensor([-1.0, -INF, -INF, -1.0], requires_grad=True)
    with use_backend(backend):
        out = kl_divergence(logprob, ref, estimator)
    out.sum().backward()
    assert out.isfinite().all() and (out[2:] == 0).all()
    assert logprob.grad.isfinite().all() and ref.grad.isfinite().all()
    assert (logprob.grad[[0, 2]] == 0).all() and (ref.grad[[1, 2]] == 0).all()


@STREAM_BACKENDS
@pytest.mark.parametrize("distance", [12.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_of_half_precision_saturate(backend, dtype, distance):
    """exp(12) is beyond fp16, whose largest number is 65504. Signs stay, and so does NaN."""
    largest = torch.finfo(dtype).max
    expected = min(math.exp(min(distance, 60.0)), largest)
    x, ref = torch.full((1,), -distance, dtype=dtype).requires_grad_(), torch.zeros(1, dtype=dtype).requires_grad_()
    with use_backend(backend):
        kl_divergence(x, ref, "k3").sum().backward()
    assert x.grad.item() == pytest.approx(-expected, rel=0.01) and ref.grad == -x.grad and x.grad.dtype == dtype
    old, advantage = torch.full((1,), -distance, dtype=dtype), -torch.ones(1, dtype=dtype)
    y = torch.zeros(1, dtype=dtype).requires_grad_()
    with use_backend(backend):
        ppo_policy_loss(y, old, advantage, normalizer=1.0).loss.backward()
    assert y.grad.item() == pytest.approx(expected, rel=0.01) and y.grad.dtype == dtype
    _, grad = policy_loss(backend, torch.zeros(1, dtype=dtype), old, advantage * NAN)
    assert grad.isnan()


@STREAM_BACKENDS
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rows_of_nan_and_rows_without_a_finite_logit(backend, temperature):
    logits = torch.randn(5, 7)
    logits[1], logits[2, 3], logits[3] = NAN, NAN, -INF
    logits[4, :3] = -INF  # filtered tokens beside finite ones
    leaf = logits.requires_grad_()
    labels = torch.tensor([0, 1, 2, 3, 0])
    with use_backend(backend):
        out = token_logprobs(leaf, labels, temperature=temperature, entropy=True)
    (out.logprob_A[:3].sum() + out.entropy_A.sum()).backward()
    assert out.logprob_A.isnan().tolist() == [False, True, True, False, False] == out.entropy_A.isnan().tolist()
    assert out.logprob_A[3:].tolist() == [-INF, -INF] and out.entropy_A[3] == 0
    finite = (logits.detach()[4, 3:] / temperature).softmax(0)
    torch.testing.assert_close(out.entropy_A[4], torch.special.entr(finite).sum())
    assert leaf.grad.isnan().all(1).tolist() == [False, True, True, False, False]
    assert leaf.grad[[0, 3, 4]].isfinite().all() and (leaf.grad[3] == 0).all()


@LINEAR_BACKENDS
def test_linear_rows_of_nan_and_rows_without_a_finite_logit(backend):
    hidden, weight = torch.tensor([[1.0], [NAN], [1.0]]), torch.full((6, 1), -INF)
    with use_backend(backend):
        out = linear_logprobs(hidden, weight, torch.tensor([0, 1, 2]), entropy=True, temperature=0.7)
    assert out.logprob_A.isnan().tolist() == [False, True, False] == out.entropy_A.isnan().tolist()
    assert out.logprob_A[0] == -INF and out.entropy_A[0] == 0 == out.entropy_A[2]


@pytest.mark.parametrize(
    ("operation", "backend"),
    [("logits", b) for b in ("reference", "triton")]
    + [("hidden", b) for b in ("reference", "chunked", "cpp", "triton")],
)
def test_logits_far_from_zero_cost_no_digits_under_a_temperature(operation, backend):
    """The peak is subtracted before the division: a quotient near -1e4 / 0.7 has an ulp of 1e-3."""
    generator = torch.Generator().manual_seed(0)
    # fp32 has these logits to 1e-3; fp64 gets the rounded ones.
    logits = torch.randn(40, 50, generator=generator) * 2 - 1e4
    labels = torch.randint(0, 50, (40,), generator=generator)
    truth = torch.log_softmax(logits.double() / 0.7, -1)
    expected = truth.gather(1, labels[:, None]).squeeze(1)
    with use_backend(backend):
        if operation == "logits":
            out = token_logprobs(logits, labels, temperature=0.7, entropy=True)
        else:
            out = linear_logprobs(torch.eye(40), logits.t().contiguous(), labels, temperature=0.7, entropy=True)
    assert (out.logprob_A - expected).abs().max() < 4e-6
    assert (out.entropy_A + (truth.exp() * truth).sum(-1)).abs().max() < 1e-5


@LINEAR_BACKENDS
def test_the_ratio_is_1_at_any_temperature(backend):
    hidden, weight, labels, _, advantage = linear_problem()
    weight = 3 * weight - 1e3
    for temperature in (0.3, 0.7, 1.0, 1.7):
        options = {"temperature": temperature, "chunk_rows": 3}
        with use_backend(backend):
            old = linear_logprobs(hidden, weight, labels, **options).logprob_A
            stats = linear_ppo_loss(hidden, weight, labels, old, advantage, normalizer=1.0, **options).stats
        assert stats.ratio_min == 1 == stats.ratio_max and stats.logprob_diff_abs_max == 0
