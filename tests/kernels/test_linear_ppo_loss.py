"""linear_ppo_loss: the gradient that is formed in the forward, against autograd through the plain composition."""

import gc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from icegrt.kernels import Moments, linear_logprobs, linear_ppo_loss, ppo_policy_loss, token_logprobs, use_backend
from icegrt.kernels.linear import chunked as linear_chunked
from icegrt.kernels.linear import products as linear_products
from icegrt.kernels.linear import torch_ops
from tests.helpers.kernel_cases import assert_within_budget


@pytest.fixture(autouse=True, params=["cpp", "chunked"])
def backend(request):
    """Run every test with each backend of a CPU that has chunks."""
    with use_backend(linear_logprobs=request.param, linear_ppo_loss=request.param):
        yield request.param


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
        {"clip_low": 0.2, "clip_high": 0.3, "surrogate": "mask", "entropy_coef": 0.1},
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
    fused_grads = torch.autograd.grad(fused.loss * 1.7, (hidden, weight))
    for fused_grad, plain_grad in zip(fused_grads, expected, strict=True):
        torch.testing.assert_close(fused_grad, plain_grad, rtol=1e-9, atol=1e-11)
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
    hidden_leaf, weight_leaf = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    (-(linear_logprobs(hidden_leaf, weight_leaf, labels).logprob_A * advantage).sum() / 2).backward()
    torch.testing.assert_close(hidden.grad, hidden_leaf.grad)
    torch.testing.assert_close(weight.grad, weight_leaf.grad)
    assert out.stats.ratio_max == 1


def test_micro_batches_give_the_gradient_of_the_whole():
    hidden, weight, labels, old, advantage, _ = problem()
    full_batch = linear_ppo_loss(hidden, weight, labels, old, advantage, normalizer=17.0)
    expected = torch.autograd.grad(full_batch.loss, (hidden, weight))
    micro_batches = [
        linear_ppo_loss(hidden[rows], weight, labels[rows], old[rows], advantage[rows], normalizer=torch.tensor(17.0))
        for rows in (slice(0, 5), slice(5, 5), slice(5, 17))
    ]
    summed_grads = torch.autograd.grad(sum(micro_batch.loss for micro_batch in micro_batches), (hidden, weight))
    for summed_grad, full_grad in zip(summed_grads, expected, strict=True):
        torch.testing.assert_close(summed_grad, full_grad)
    stats = micro_batches[0].stats.merge(micro_batches[1].stats).merge(micro_batches[2].stats)
    for name in ("count", "loss_sum", "clipped_sum", "ratio_min", "ratio_max"):
        torch.testing.assert_close(getattr(stats, name), getattr(full_batch.stats, name))


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
    wide_hidden, wide_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    linear_ppo_loss(wide_hidden, wide_weight, labels, None, advantage, normalizer=1.0).loss.backward()
    assert (buffer.double() - wide_weight.grad).norm() / wide_weight.grad.norm() < 1e-5


def test_no_gradient_is_formed_under_no_grad_or_for_frozen_inputs(monkeypatch):
    hidden, weight, labels, old, advantage, _ = problem()
    gradients = []
    add = linear_products.Gradients.add
    monkeypatch.setattr(linear_products.Gradients, "add", lambda self, *a: gradients.append(self) or add(self, *a))
    with torch.no_grad():
        assert not linear_ppo_loss(hidden, weight, labels, old, advantage, normalizer=1.0).loss.requires_grad
    linear_ppo_loss(hidden.detach(), weight.detach(), labels, old, advantage, normalizer=1.0)
    assert gradients == []
    linear_ppo_loss(hidden, weight.detach(), labels, old, advantage, normalizer=1.0).loss.backward()
    assert gradients[0].weight_VH is None and hidden.grad is not None
    linear_ppo_loss(hidden.detach(), weight, labels, old, advantage, normalizer=1.0).loss.backward()
    assert gradients[-1].hidden_AH is None and weight.grad is not None


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
    product_shapes = []
    product = linear_products.product

    def recorded_product(a, b, out, add=False):
        product_shapes.append(a.shape)
        return product(a, b, out, add)

    monkeypatch.setattr(linear_products, "product", recorded_product)
    out = linear_ppo_loss(hidden, weight, labels, old, advantage, normalizer=2.0, mask_A=mask, chunk_rows=64)
    counted = (labels != -100) & (mask if masked else torch.ones(17, dtype=torch.bool))
    active = int((counted & (advantage != 0)).sum() - out.stats.clipped_sum)
    rows = int(counted.sum()) if masked else 17  # the mask decides about the product of the logits, nothing else
    assert product_shapes == [(rows, 5), (active, 11), (11, active)]
    with use_backend("reference"):
        plain = linear_ppo_loss(hidden, weight, labels, old, advantage, normalizer=2.0, mask_A=mask)
    fused_grads, expected = (torch.autograd.grad(x.loss, (hidden, weight)) for x in (out, plain))
    for fused_grad, plain_grad in zip(fused_grads, expected, strict=True):
        torch.testing.assert_close(fused_grad, plain_grad)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    A=st.sampled_from([0, 1, 3, 17, 64]),
    V=st.sampled_from([1, 2, 31, 257]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    masked=st.booleans(),
    strided=st.booleans(),
    weight_scale=st.sampled_from([0.0, 1.0, 30.0]),
    entropy_coef=st.sampled_from([0.0, 0.05]),
    chunk_rows=st.sampled_from([1, 5, 64, None]),
    surrogate=st.sampled_from(["clip", "mask"]),
    seed=st.integers(0, 99),
)
def test_drawn_problems_stay_within_the_budget(
    backend, A, V, dtype, masked, strided, weight_scale, entropy_coef, chunk_rows, surrogate, seed
):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(A, 16, generator=generator).to(dtype)[:, :: 2 if strided else 1]
    weight = (torch.randn(hidden.shape[1], V, generator=generator) * weight_scale).to(dtype).t()
    weight = weight if strided else weight.contiguous()
    labels = torch.randint(0, V, (A,), generator=generator)
    old, advantage = torch.randn(2, A, generator=generator)
    options = {"normalizer": 7.0, "entropy_coef": entropy_coef, "temperature": 0.7, "surrogate": surrogate}
    options["mask_A"] = torch.arange(A) % 3 != 1 if masked else None

    def loss_and_gradients(backend, leaf_dtype, chunk_rows=None):
        leaves = [x.detach().to(leaf_dtype).requires_grad_() for x in (hidden, weight)]
        streams = (x.double() if leaf_dtype == torch.float64 else x for x in (old - 1, advantage))
        with use_backend(linear_ppo_loss=backend):
            loss = linear_ppo_loss(*leaves, labels, *streams, chunk_rows=chunk_rows, **options).loss
        return loss, *torch.autograd.grad(loss, leaves)

    chunked_results = loss_and_gradients(backend, dtype, chunk_rows)
    plain_results, truths = (loss_and_gradients("reference", x) for x in (dtype, torch.float64))
    for chunked, plain, truth in zip(chunked_results, plain_results, truths, strict=True):
        scale = max(1.0, truth.detach().abs().max().item()) if truth.numel() else 1.0
        assert_within_budget(chunked, plain, truth, atol=2e-5 * scale)


def test_loss_and_gradients_repeat_to_the_bit():
    hidden, weight, labels, old, advantage, _ = problem(torch.float32, A=50, H=16, V=300)
    options = {"normalizer": 9.0, "chunk_rows": 16, "clip_low": 0.05, "entropy_coef": 0.01}
    results = []
    for _ in range(2):
        loss = linear_ppo_loss(hidden, weight, labels, old, advantage, **options).loss
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("op", ["linear_logprobs", "linear_ppo_loss"])
def test_no_chunk_of_logits_is_held_until_backward(op):
    hidden, weight = torch.randn(9, 4, requires_grad=True), torch.randn(1013, 4, requires_grad=True)
    labels = torch.arange(9)
    if op == "linear_logprobs":
        out = linear_logprobs(hidden, weight, labels, chunk_rows=4).logprob_A.sum()
    else:
        out = linear_ppo_loss(hidden, weight, labels, None, torch.ones(9), normalizer=1.0, chunk_rows=4).loss
    # torch 2.11: isinstance reads __class__, and torch.distributed.reduce_op warns at any read. So types are compared.
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    assert not [x.shape for x in tensors if x.shape[-1:] == (1013,)]
    out.backward()


def test_rows_that_stay_keep_their_places_where_they_can():
    # Private: the order of rows shows in the memory traffic alone, not in any result.
    active_rows, compact_rows = linear_chunked._active_rows, torch_ops._compact_rows
    grad_logprob = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    active = active_rows(grad_logprob, None)
    assert active.tolist() == [0, 5, 2, 7, 4] and grad_logprob[active].all()
    logits = torch.arange(8.0)[:, None].repeat(1, 3)
    assert torch.equal(compact_rows(logits, active)[:, 0], active.float())
    assert active_rows(torch.ones(3), None) is None and not active_rows(torch.zeros(3), None).numel()
    assert active_rows(torch.zeros(3), torch.tensor([0.0, 0.0, 2.0])).tolist() == [2]


class Waits(TorchDispatchMode):
    """Records operations for which the host would wait for a device: it reads a number, or how many rows there are."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indices = args[1] if func is torch.ops.aten.index.Tensor else []
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        name = func.overloadpacket.__name__
        if by_mask or name in ("nonzero", "masked_select", "_local_scalar_dense"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keep", [[1, 0, 0, 1, 0, 1, 0, 1], [1, 1, 1, 0], [0, 0, 1], [0, 0], [1, 1]])
def test_the_host_waits_once_for_the_rows_with_a_gradient(keep):
    with Waits() as waits:
        active = linear_chunked._active_rows(torch.tensor(keep, dtype=torch.float64), None)
    assert waits.names == ["nonzero"]
    assert active is None if all(keep) else sorted(active.tolist()) == [i for i, kept in enumerate(keep) if kept]
