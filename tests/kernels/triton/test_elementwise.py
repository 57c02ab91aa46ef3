"""kl_divergence, masked_moments and whiten in Triton under the interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icegrt.kernels import kl_divergence, masked_moments, record_launches, use_backend, whiten
from tests.helpers.kernel_cases import assert_within_budget, worst

ESTIMATORS = ("k1", "k2", "k3", "abs")


def kl_and_gradients(logprob, ref, estimator, upstream, backend):
    logprob, ref = logprob.clone().requires_grad_(), ref.clone().requires_grad_()
    with use_backend(backend), record_launches() as launches:
        out = kl_divergence(logprob, ref, estimator)
        out.backward(upstream.to(out.dtype).expand_as(out))
    if backend == "triton":
        assert launches == [("kl_forward_kernel", "triton"), ("kl_backward_kernel", "triton")]
    return out.detach(), logprob.grad, ref.grad


def check_kl(estimator="k3", size=300):
    torch.manual_seed(0)
    extreme = torch.tensor([-100.0, 0.0, 100.0, 1e-3, -1e-3, 0.49, -0.51])
    d = torch.cat([extreme, torch.randn(size)])
    ref = torch.cat([torch.zeros(7), -torch.rand(size)])
    upstream = torch.randn(d.shape)
    ours = kl_and_gradients(d, ref, estimator, upstream, "triton")
    plain = kl_and_gradients(d, ref, estimator, upstream, "reference")
    truth = kl_and_gradients(d.double(), ref.double(), estimator, upstream, "reference")
    for a, b, exact in zip(ours, plain, truth, strict=True):
        assert torch.isfinite(a).all()
        scale = exact.abs().clamp(min=1e-3)  # the exponential spans 30 decades: errors are relative
        assert_within_budget(a.double() / scale, b.double() / scale, exact / scale, 1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_forward_and_backward(estimator):
    check_kl(estimator)


def test_kl_of_views_stride_0_gradients_half_precision_and_nothing():
    x = torch.randn(6, 4)
    ours = kl_and_gradients(x.t(), x.t() * 0.5, "k3", torch.ones(()), "triton")
    plain = kl_and_gradients(x.t(), x.t() * 0.5, "k3", torch.ones(()), "reference")
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)
    half = x.half()
    out = kl_and_gradients(half, half * 2, "k2", torch.ones(()), "triton")
    assert out[0].dtype == torch.float32 and out[1].dtype == torch.float16
    with use_backend("triton"):
        assert kl_divergence(torch.zeros(0), torch.zeros(0), "k1").shape == (0,)


def test_double_backward_is_refused_by_name():
    x = torch.randn(3, requires_grad=True)
    with use_backend("triton"), pytest.raises(RuntimeError, match="kl_divergence: double backward"):
        torch.autograd.grad(kl_divergence(x, torch.zeros(3), "k2").sum(), x, create_graph=True)
    with use_backend("triton"), pytest.raises(RuntimeError, match="whiten: double backward"):
        torch.autograd.grad(whiten(x, masked_moments(x)).sum(), x, create_graph=True)


def triton_moments(x, mask=None):
    with use_backend("triton"), record_launches() as launches:
        out = masked_moments(x, mask)
    assert launches == [("masked_moments_kernel", "triton")]
    return out


def check_moments(size=9000, mean=1e4):
    torch.manual_seed(0)
    x = torch.randn(size) * 3 + mean  # a mean far from 0: sums of squares would lose every digit
    mask = torch.rand(size) > 0.3
    dirty = torch.where(mask, x, torch.nan)
    ours = triton_moments(dirty, mask)
    truth = masked_moments(x.double(), mask)
    assert ours.count == truth.count
    torch.testing.assert_close(ours.mean, truth.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.m2, truth.m2, rtol=1e-9, atol=0)
    again = triton_moments(dirty, mask)
    assert ours == again


def test_moments_of_several_blocks_masked_nan_and_a_far_mean():
    check_moments()


@given(
    size=st.sampled_from([0, 1, 2, 31, 4095, 4097]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    masked=st.booleans(),
    stride=st.integers(1, 3),
)
@settings(max_examples=12)
def test_moments_and_whitening_of_drawn_streams(size, dtype, masked, stride):
    x = (torch.randn(size * stride) * 5 + 3).to(dtype)[::stride]
    mask = torch.rand(size) > 0.5 if masked else None
    ours, truth = triton_moments(x, mask), masked_moments(x.double(), mask)
    for name in ("count", "mean", "m2"):
        torch.testing.assert_close(getattr(ours, name), getattr(truth, name), rtol=1e-12, atol=1e-12)
    check_whiten(x)


def check_whiten(x=None):
    x = torch.randn(5000) * 5 + 1e3 if x is None else x
    moments = masked_moments(x.double())
    for shift in (True, False):
        leaf = x.clone().requires_grad_()
        with use_backend("triton"), record_launches() as launches:
            ours = whiten(leaf, moments, shift_mean=shift)
            ours.sum().backward()
        assert launches == [("whiten_kernel", "triton")] * (2 if x.numel() else 0)
        with use_backend("reference"):
            plain = whiten(x, moments, shift_mean=shift)
        truth = whiten(x.double(), moments, shift_mean=shift)
        assert ours.dtype == torch.float32 and leaf.grad.dtype == x.dtype
        assert_within_budget(ours, plain, truth, 1e-6)
        scale = torch.rsqrt(moments.variance + 1e-8)
        assert worst(leaf.grad, scale.to(x.dtype).expand_as(x)) <= 1e-2 * scale


def test_whiten_forward_and_backward():
    check_whiten()
