"""kl_divergence in Triton under the interpreter."""

import pytest
import torch

from icegrt.kernels import kl_divergence, record_launches, use_backend
from tests.helpers.kernel_cases import assert_within_budget

ESTIMATORS = ("k1", "k2", "k3", "abs")


def kl_and_gradients(logprob, ref, estimator, upstream, backend):
    logprob, ref = logprob.clone().requires_grad_(), ref.clone().requires_grad_()
    with use_backend(backend), record_launches() as launches:
        kl = kl_divergence(logprob, ref, estimator)
        kl.backward(upstream.to(kl.dtype).expand_as(kl))
    if backend == "triton":
        assert launches == [("kl_forward_kernel", "triton"), ("kl_backward_kernel", "triton")]
    return kl.detach(), logprob.grad, ref.grad


def check_kl(estimator="k3", size=300):
    torch.manual_seed(0)
    extreme = torch.tensor([-100.0, 0.0, 100.0, 1e-3, -1e-3, 0.49, -0.51])
    logprob = torch.cat([extreme, torch.randn(size)])
    ref = torch.cat([torch.zeros(7), -torch.rand(size)])
    upstream = torch.randn(logprob.shape)
    fused_results = kl_and_gradients(logprob, ref, estimator, upstream, "triton")
    plain_results = kl_and_gradients(logprob, ref, estimator, upstream, "reference")
    truths = kl_and_gradients(logprob.double(), ref.double(), estimator, upstream, "reference")
    for fused, plain, truth in zip(fused_results, plain_results, truths, strict=True):
        assert torch.isfinite(fused).all()
        scale = truth.abs().clamp(min=1e-3)  # the exponential spans 30 decades: errors are relative
        assert_within_budget(fused.double() / scale, plain.double() / scale, truth / scale, 1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_forward_and_backward(estimator):
    check_kl(estimator)


def test_kl_of_views_stride_0_gradients_half_precision_and_nothing():
    x = torch.randn(6, 4)
    fused_results, plain_results = (
        kl_and_gradients(x.t(), x.t() * 0.5, "k3", torch.ones(()), backend) for backend in ("triton", "reference")
    )
    for fused, plain in zip(fused_results, plain_results, strict=True):
        torch.testing.assert_close(fused, plain)
    half = x.half()
    kl, logprob_grad, _ = kl_and_gradients(half, half * 2, "k2", torch.ones(()), "triton")
    assert kl.dtype == torch.float32 and logprob_grad.dtype == torch.float16
    with use_backend("triton"):
        assert kl_divergence(torch.zeros(0), torch.zeros(0), "k1").shape == (0,)


def test_double_backward_is_refused_by_name():
    x = torch.randn(3, requires_grad=True)
    with use_backend("triton"), pytest.raises(RuntimeError, match="kl_divergence: double backward"):
        torch.autograd.grad(kl_divergence(x, torch.zeros(3), "k2").sum(), x, create_graph=True)
