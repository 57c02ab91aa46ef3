"""masked_moments and whiten in Triton under the interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icegrt.kernels import masked_moments, record_launches, use_backend, whiten
from tests.helpers.kernel_cases import assert_within_budget, worst


def triton_moments(x, mask=None):
    with use_backend("triton"), record_launches() as launches:
        moments = masked_moments(x, mask)
    assert launches == [("masked_moments_kernel", "triton")]
    return moments


def check_moments(size=9000, mean=1e4):
    torch.manual_seed(0)
    x = torch.randn(size) * 3 + mean  # a mean far from 0: sums of squares would lose every digit
    mask = torch.rand(size) > 0.3
    dirty = torch.where(mask, x, torch.nan)
    moments = triton_moments(dirty, mask)
    truth = masked_moments(x.double(), mask)
    assert moments.count == truth.count
    torch.testing.assert_close(moments.mean, truth.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.m2, truth.m2, rtol=1e-9, atol=0)
    assert moments == triton_moments(dirty, mask)


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
    moments, truth = triton_moments(x, mask), masked_moments(x.double(), mask)
    for name in ("count", "mean", "m2"):
        torch.testing.assert_close(getattr(moments, name), getattr(truth, name), rtol=1e-12, atol=1e-12)
    check_whiten(x)


def check_whiten(x=None):
    x = torch.randn(5000) * 5 + 1e3 if x is None else x
    moments = masked_moments(x.double())
    for shift in (True, False):
        leaf = x.clone().requires_grad_()
        with use_backend("triton"), record_launches() as launches:
            white = whiten(leaf, moments, shift_mean=shift)
            white.sum().backward()
        assert launches == [("whiten_kernel", "triton")] * (2 if x.numel() else 0)
        with use_backend("reference"):
            plain = whiten(x, moments, shift_mean=shift)
        truth = whiten(x.double(), moments, shift_mean=shift)
        assert white.dtype == torch.float32 and leaf.grad.dtype == x.dtype
        assert_within_budget(white, plain, truth, 1e-6)
        scale = torch.rsqrt(moments.variance + 1e-8)
        assert worst(leaf.grad, scale.to(x.dtype).expand_as(x)) <= 1e-2 * scale


def test_whiten_forward_and_backward():
    check_whiten()


def test_double_backward_is_refused_by_name():
    x = torch.randn(3, requires_grad=True)
    with use_backend("triton"), pytest.raises(RuntimeError, match="whiten: double backward"):
        torch.autograd.grad(whiten(x, masked_moments(x)).sum(), x, create_graph=True)
