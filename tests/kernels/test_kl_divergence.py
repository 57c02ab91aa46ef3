"""kl_divergence: sign conventions, small differences, and the overflow of k3."""

import pytest
import torch

from icegrt.kernels import kl_divergence


def test_sign_conventions():
    logprob, ref = torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -1.5])
    d = logprob - ref
    torch.testing.assert_close(kl_divergence(logprob, ref, "k1"), d)
    torch.testing.assert_close(kl_divergence(logprob, ref, "k2"), d * d / 2)
    torch.testing.assert_close(kl_divergence(logprob, ref, "k3"), torch.exp(-d) - 1 + d)
    torch.testing.assert_close(kl_divergence(logprob, ref, "abs"), d.abs())


def test_k3_of_small_differences_keeps_its_digits_and_of_large_ones_stays_finite():
    d = torch.tensor([1e-4, -100.0, 0.0, 100.0], requires_grad=True)
    kl = kl_divergence(d, torch.zeros(4), "k3")
    assert kl[0].item() >= 0 and kl[2] == 0
    assert torch.isfinite(kl).all() and (kl >= 0).all()
    kl.sum().backward()
    assert torch.isfinite(d.grad).all()
    assert d.grad[1] < 0 and d.grad[3] > 0  # still downhill towards d = 0


def test_expected_value_over_samples_is_the_divergence():
    p, q = torch.randn(2, 20, dtype=torch.float64).log_softmax(-1)
    truth = (p.exp() * (p - q)).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((p.exp() * kl_divergence(p, q, estimator)).sum(), truth)


def test_dtypes_and_errors():
    x = torch.zeros(2, dtype=torch.bfloat16)
    assert kl_divergence(x, x, "k3").dtype == torch.float32
    with pytest.raises(ValueError, match="estimator must be one of"):
        kl_divergence(x, x, "k9")
    with pytest.raises(ValueError, match="ref_logprob_A must have shape"):
        kl_divergence(x, x[:1], "k1")
    with pytest.raises(TypeError, match=r"ref_logprob_A must be floating point, got torch\.int64"):
        kl_divergence(x, x.long(), "k1")
    with pytest.raises(ValueError, match=r"ref_logprob_A must be on cpu .* got meta"):
        kl_divergence(x, x.to("meta"), "k1")
