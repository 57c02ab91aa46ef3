"""linear_ppo_loss: the gradient that is formed in the forward, against autograd through the plain composition."""

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icegrt.kernels import Moments, linear_logprobs, linear_ppo_loss, ppo_policy_loss, token_logprobs, use_backend
from icegrt.kernels.linear import chunked as linear_chunked
from icegrt.kernels.linear import products as linear_products
from icegrt.kernels.linear import torch_ops as linear_rows
from tests.helpers.kernel_cases import assert_within_budget


def problem(dtype=torch.float64, A=17, H=5, V=11):
    hidden, weight = torch.randn(A, H, dtype=dtype), torch.randn(V, H, dtype=dtype)
    labels = torch.randint(0, V, (A,))
    labels[3] = -100
    logprob = token_logprobs(hidden @ weight.t(), labels, temperature=0.7).logprob_A
    old, ref = logprob + 0.4 * torch.randn(A, dtype=dtype), logprob + 0.4 * torch.randn(A, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), labels, old, torch.randn(A, dtype=dtype), ref


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "objective",
    [
        {},
        {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.5},
        {"kl_coef": 0.3, "kl_estimator": "k3"},
        {"kl_coef": 0.3, "kl_estimator": "k1", "kl_gradient": "raw", "entropy_coef": 0.1},
        {"entropy_coef": torch.tensor(0.2, dtype=torch.float64), "shift_mean": False},
    ],
)
def test_value_and_gradient_are_those_of_the_composition(objective, masked):
    hidden, weight, labels, old, advantage, ref = problem()
    counted = labels != -100
    mask = None
    if masked:
        mask = torch.rand(17) > 0.3
        counted = counted & mask
    moments = Moments(*(torch.tensor(x, dtype=torch.float64) for x in (4.0, 0.5, 8.0)))
    factors = torch.rand(17, dtype=torch.float64)
    options = {"ref_logprob_A": ref, "weight_A": factors, "normalizer": 3.0, "moments": moments, **objective}
    scored = token_logprobs(hidden @ weight.t(), labels, temperature=0.7, entropy=True)
    plain = ppo_policy_loss(scored.logprob_A, old, advantage, entropy_A=scored.entropy_A, mask_A=counted, **options)
    expected = torch.autograd.grad(plain.loss * 1.7, (hidden, weight))
    fused = linear_ppo_loss(
        hidden, weight, labels, old, advantage, mask_A=mask, temperature=0.7, chunk_rows=4, **options
    )
    torch.testing.assert_close(fused.loss, plain.loss)
    got = torch.autograd.grad(fused.loss * 1.7, (hidden, weight))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    for name in ("count", "clipped_sum", "dual_clipped_sum", "ratio_max", "loss_sum", "ref_kl_sum"):
        torch.testing.assert_close(getattr(fused.stats, name), getattr(plain.stats, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_ratio_is_exactly_one_after_scoring_with_the_same_weights(dtype, masked):
    hidden, weight, labels = (
        torch.randn(333, 48).to(dtype),
        torch.randn(997, 48).to(dtype),
        torch.randint(0, 997, (333,)),
    )
    mask = torch.rand(333) > 0.4 if masked else None
    options = {"mask_A": mask, "temperature": 0.9, "chunk_rows": 64}
    with torch.no_grad():
        old = linear_logprobs(hidden, weight, labels, **options).logprob_A
    out = linear_ppo_loss(
        hidden.requires_grad_(),
        weight,
        labels,
        old,
        torch.randn(333),
        ref_logprob_A=old,
        normalizer=1.0,
        entropy_coef=0.1,
        **options,
    )
    assert out.stats.ratio_min == 1 and out.stats.ratio_max == 1 and out.stats.logprob_diff_abs_max == 0
    assert out.stats.kl_old_new_sum == 0 and out.stats.ref_kl_sum == 0 and out.stats.clipped_sum == 0


def test_on_policy_is_the_detached_own_logprob():
    hidden, weight, labels, _, advantage, _ = problem()
    out = linear_ppo_loss(hidden, weight, labels, None, advantage, normalizer=2.0)
    out.loss.backward()
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    (-(linear_logprobs(h, w, labels).logprob_A * advantage).sum() / 2).backward()
    torch.testing.assert_close(hidden.grad, h.grad)
    torch.testing.assert_close(weight.grad, w.grad)
    assert out.stats.ratio_max == 1


def test_micro_batches_give_the_gradient_of_the_whole():
    hidden, weight, labels, old, advantage, _ = problem()
    whole = linear_ppo_loss(hidden, weight, labels, old, advantage, normalizer=17.0)
    expected = torch.autograd.grad(whole.loss, (hidden, weight))
    parts = [
        linear_ppo_loss(hidden[r], weight, labels[r], old[r], advantage[r], normalizer=torch.tensor(17.0))
        for r in (slice(0, 5), slice(5, 5), slice(5, 17))
    ]
    got = torch.autograd.grad(sum(p.loss for p in parts), (hidden, weight))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    stats = parts[0].stats.merge(parts[1].stats).merge(parts[2].stats)
    for name in ("count", "loss_sum", "clipped_sum", "ratio_min", "ratio_max"):
        torch.testing.assert_close(getattr(stats, name), getattr(whole.stats, name))


def test_backward_adds_to_the_callers_buffer_and_twice_is_twice():
    hidden, weight, labels, old, advantage, _ = problem(torch.float32)
    expected = torch.autograd.grad(linear_ppo_loss(hidden, weight, labels, old, advantage, normalizer=3.0).loss, weight)
    buffer = torch.ones_like(weight)
    out = linear_ppo_loss(hidden, weight, labels, old, advantage, normalizer=3.0, weight_grad_out=buffer)
    assert (buffer == 1).all()
    for _ in range(2):
        (out.loss * 0.5).backward(retain_graph=True)
    assert weight.grad is None and weight.grad_added_to_main_grad
    torch.testing.assert_close(buffer - 1, expected[0])


def test_weight_gradient_is_summed_in_fp32_over_chunks():
    hidden, weight, labels, _, advantage, _ = problem(torch.bfloat16, A=512)
    buffer = torch.zeros(11, 5)
    linear_ppo_loss(
        hidden, weight, labels, None, advantage, normalizer=1.0, chunk_rows=4, weight_grad_out=buffer
    ).loss.backward()
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    linear_ppo_loss(h, w, labels, None, advantage, normalizer=1.0).loss.backward()
    assert (buffer.double() - w.grad).norm() / w.grad.norm() < 1e-5


def test_no_gradient_is_formed_under_no_grad_or_for_frozen_inputs(monkeypatch):
    hidden, weight, labels, old, advantage, _ = problem()
    formed = []
    add = linear_products.Gradients.add
    monkeypatch.setattr(linear_products.Gradients, "add", lambda self, *a: formed.append(self) or add(self, *a))
    with torch.no_grad():
        assert not linear_ppo_loss(hidden, weight, labels, old, advantage, normalizer=1.0).loss.requires_grad
    linear_ppo_loss(hidden.detach(), weight.detach(), labels, old, advantage, normalizer=1.0)
    assert formed == []
    linear_ppo_loss(hidden, weight.detach(), labels, old, advantage, normalizer=1.0).loss.backward()
    assert formed[0].weight_VH is None and hidden.grad is not None
    linear_ppo_loss(hidden.detach(), weight, labels, old, advantage, normalizer=1.0).loss.backward()
    assert formed[-1].hidden_AH is None and weight.grad is not None


def test_a_non_scalar_upstream_gradient_is_refused():
    hidden, weight, labels, old, advantage, _ = problem()
    loss = linear_ppo_loss(hidden, weight, labels, old, advantage, normalizer=1.0).loss
    with pytest.raises(RuntimeError):
        loss.backward(torch.ones(3))


def test_nan_where_masked_does_not_leak_and_dtypes_stay_fp32():
    hidden, weight, labels, old, advantage, _ = problem(torch.float32)
    mask = torch.ones(17)
    mask[7] = 0
    for x in (old, advantage):
        x[3], x[7] = torch.nan, torch.nan
    with torch.no_grad():
        hidden[7] = torch.nan
    out = linear_ppo_loss(hidden, weight, labels, old, advantage, mask_A=mask, normalizer=2.5)
    out.loss.backward()
    assert out.loss.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert torch.isfinite(out.loss) and torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()
    assert out.stats.count == 15


def test_a_kl_coefficient_without_a_reference_is_refused():
    hidden, weight, labels, old, advantage, _ = problem()
    with pytest.raises(ValueError, match="ref_logprob_A must be given"):
        linear_ppo_loss(hidden, weight, labels, old, advantage, normalizer=1.0, kl_coef=0.1)


@pytest.mark.parametrize("masked", [False, True])
def test_rows_without_gradient_leave_before_the_backward_products(monkeypatch, masked):
    """Clipped rows and rows without advantage; the gradient is that of the composition all the same."""
    hidden, weight, labels, old, advantage, _ = problem()
    advantage[::2] = 0
    mask = torch.arange(17) % 5 != 1 if masked else None
    seen = []
    product = linear_products.product
    monkeypatch.setattr(
        linear_products, "product", lambda a, b, out, add=False: seen.append(a.shape) or product(a, b, out, add)
    )
    out = linear_ppo_loss(hidden, weight, labels, old, advantage, normalizer=2.0, mask_A=mask, chunk_rows=64)
    counted = (labels != -100) & (mask if masked else torch.ones(17, dtype=torch.bool))
    live = int((counted & (advantage != 0)).sum() - out.stats.clipped_sum)
    rows = int(counted.sum()) if masked else 17  # the mask decides about the product of the logits, nothing else
    assert seen == [(rows, 5), (live, 11), (11, live)]
    with use_backend("reference"):
        plain = linear_ppo_loss(hidden, weight, labels, old, advantage, normalizer=2.0, mask_A=mask)
    got, expected = (torch.autograd.grad(x.loss, (hidden, weight)) for x in (out, plain))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@given(
    A=st.sampled_from([0, 1, 3, 17, 64]),
    V=st.sampled_from([1, 2, 31, 257]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    masked=st.booleans(),
    strided=st.booleans(),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    entropy_coef=st.sampled_from([0.0, 0.05]),
    chunk_rows=st.sampled_from([1, 5, 64, None]),
    seed=st.integers(0, 99),
)
def test_drawn_problems_stay_within_the_budget(A, V, dtype, masked, strided, scale, entropy_coef, chunk_rows, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(A, 16, generator=generator).to(dtype)[:, :: 2 if strided else 1]
    weight = (torch.randn(hidden.shape[1], V, generator=generator) * scale).to(dtype).t()
    weight = weight if strided else weight.contiguous()
    labels = torch.randint(0, V, (A,), generator=generator)
    old, advantage = torch.randn(2, A, generator=generator)
    options = {"normalizer": 7.0, "entropy_coef": entropy_coef, "temperature": 0.7}
    options["mask_A"] = torch.arange(A) % 3 != 1 if masked else None

    def answer(backend, kind, **more):
        h, w = (x.detach().to(kind).requires_grad_() for x in (hidden, weight))
        streams = (x.double() if kind == torch.float64 else x for x in (old - 1, advantage))
        with use_backend(linear_ppo_loss=backend):
            loss = linear_ppo_loss(h, w, labels, *streams, **options, **more).loss
        return loss, *torch.autograd.grad(loss, (h, w))

    ours, plain = answer("chunked", dtype, chunk_rows=chunk_rows), answer("reference", dtype)
    for mine, same, truth in zip(ours, plain, answer("reference", torch.float64), strict=True):
        top = max(1.0, truth.detach().abs().max().item()) if truth.numel() else 1.0
        assert_within_budget(mine, same, truth, atol=2e-5 * top)


def test_loss_and_gradients_repeat_to_the_bit():
    hidden, weight, labels, old, advantage, _ = problem(torch.float32, A=50, H=16, V=300)
    options = {"normalizer": 9.0, "chunk_rows": 16, "clip_low": 0.05, "entropy_coef": 0.01}
    found = []
    for _ in range(2):
        out = linear_ppo_loss(hidden, weight, labels, old, advantage, **options)
        found.append((out.loss, *torch.autograd.grad(out.loss, (hidden, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("op", ["linear_logprobs", "linear_ppo_loss"])
def test_no_chunk_of_logits_is_held_until_backward(op):
    hidden, weight = torch.randn(9, 4, requires_grad=True), torch.randn(1013, 4, requires_grad=True)
    labels = torch.arange(9)
    if op == "linear_logprobs":
        out = linear_logprobs(hidden, weight, labels, chunk_rows=4).logprob_A.sum()
    else:
        out = linear_ppo_loss(hidden, weight, labels, None, torch.ones(9), normalizer=1.0, chunk_rows=4).loss
    # By type: isinstance would ask torch's deprecated objects for their class, and they warn.
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    assert not [x.shape for x in tensors if x.shape[-1:] == (1013,)]
    out.backward()


def test_rows_that_stay_keep_their_places_where_they_can():
    gradient = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    live = linear_chunked._active_rows(gradient, None)
    assert live.tolist() == [0, 5, 2, 7, 4] and gradient[live].all()
    z = torch.arange(8.0)[:, None].repeat(1, 3)
    assert torch.equal(linear_rows._compact_rows(z, live)[:, 0], live.float())
    assert (
        linear_chunked._active_rows(torch.ones(3), None) is None
        and not linear_chunked._active_rows(torch.zeros(3), None).numel()
    )
    assert linear_chunked._active_rows(torch.zeros(3), torch.tensor([0.0, 0.0, 2.0])).tolist() == [2]
