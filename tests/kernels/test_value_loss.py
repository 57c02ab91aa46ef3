"""value_loss: the recipe's formula, its clip, its mask, and enough statistics for the explained variance."""

import math

import pytest
import torch

from icegrt.kernels import use_backend, value_loss

SPLITS = slice(0, 1), slice(1, 700), slice(700, 1500)


def test_formula_and_gradient():
    value, old, target = torch.randn(3, 40, dtype=torch.float64)
    value.requires_grad_()
    out = value_loss(value, old, target, clip=0.2, normalizer=40)
    bounded = torch.minimum(torch.maximum(value, old - 0.2), old + 0.2)
    plain = 0.5 * torch.maximum((value - target) ** 2, (bounded - target) ** 2).mean()
    torch.testing.assert_close(out.loss, plain)
    fused_grad, plain_grad = (torch.autograd.grad(x, value)[0] for x in (out.loss, plain))
    torch.testing.assert_close(fused_grad, plain_grad)
    assert out.stats.clipped_sum == ((bounded - target).abs() > (value - target).abs()).sum()


def test_without_clip_no_old_value_is_needed():
    value, target = torch.randn(2, 9)
    out = value_loss(value, None, target, clip=None, normalizer=1.0)
    torch.testing.assert_close(out.loss, 0.5 * (value - target).square().sum())
    with pytest.raises(ValueError, match="old_value_A must be given"):
        value_loss(value, None, target, normalizer=1.0)


def test_mask_weights_and_statistics():
    value, old, target = torch.randn(3, 30)
    mask = torch.rand(30) > 0.4
    out = value_loss(value, old, target, clip=None, normalizer=2.0, mask_A=mask, weight_A=torch.full((30,), 3.0))
    torch.testing.assert_close(out.loss, 0.75 * (value - target)[mask].square().sum())
    dirty = [torch.where(mask, x, torch.nan) for x in (value, old, target)]
    dirty_out = value_loss(*dirty, clip=None, normalizer=2.0, mask_A=mask, weight_A=torch.full((30,), 3.0))
    assert dirty_out.loss == out.loss and dirty_out.stats == out.stats
    explained = 1 - (target - value)[mask].var(correction=0) / target[mask].var(correction=0)
    assert out.stats.explained_variance.item() == pytest.approx(explained.item(), rel=1e-5)
    halves = [
        value_loss(
            value[r], old[r], target[r], clip=None, normalizer=2.0, mask_A=mask[r], weight_A=torch.full((n,), 3.0)
        )
        for r, n in ((slice(0, 11), 11), (slice(11, 30), 19))
    ]
    torch.testing.assert_close(halves[0].stats.merge(halves[1].stats).explained_variance, out.stats.explained_variance)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("constant", [0.1, -3.3e7, 0.0])
def test_constant_returns_explain_nothing(backend, constant):
    """Rounding of the sums is no variance: 1 minus a quotient of rounding errors is about -1e9."""
    returns, value = torch.full((1500,), constant), torch.linspace(-1, 1, 1500)
    with use_backend(backend):
        parts = [value_loss(value[r], None, returns[r], clip=None, normalizer=1.0).stats for r in SPLITS]
    assert all(part.explained_variance == 0 for part in parts)
    assert parts[0].merge(parts[1]).merge(parts[2]).explained_variance == 0


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_explained_variance_of_returns_far_from_zero(share):
    """Returns of 1e6 +- 1e-3, of whose deviation the values explain a share; split and merged too."""
    deviation = 1e-3 * torch.randn(1500, dtype=torch.float64)
    returns, value = 1e6 + deviation, 1e6 + share * deviation
    whole, *parts = (
        value_loss(value[r], None, returns[r], clip=None, normalizer=1.0).stats for r in (slice(None), *SPLITS)
    )
    expected = pytest.approx(1 - (1 - share) ** 2, abs=1e-5)
    assert whole.explained_variance.item() == expected
    assert parts[0].merge(parts[1]).merge(parts[2]).explained_variance.item() == expected


def test_explained_variance_of_fp32_on_every_backend():
    deviation = 1e-3 * torch.randn(1500)
    returns = 1.0 + deviation
    for backend in ("reference", "triton"):
        with use_backend(backend):
            stats = value_loss(1.0 + 0.5 * (returns - 1.0), None, returns, clip=None, normalizer=1.0).stats
        assert stats.explained_variance.item() == pytest.approx(0.75, abs=1e-4), backend


def test_explained_variance_of_nan_is_nan():
    stats = value_loss(torch.ones(3), None, torch.tensor([1.0, math.nan, 2.0]), clip=None, normalizer=1.0).stats
    assert stats.explained_variance.isnan()


def test_empty_and_dtypes():
    empty = torch.zeros(0, requires_grad=True)
    out = value_loss(empty, empty, empty, normalizer=5.0)
    out.loss.backward()
    assert out.loss == 0 and out.stats.count == 0 and out.stats.explained_variance == 0
    half = value_loss(torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2), torch.ones(2), normalizer=2)
    assert half.loss.dtype == torch.float32


def test_errors_name_the_argument():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="clip must be finite"):
        value_loss(x, x, x, clip=0.0, normalizer=1.0)
    with pytest.raises(ValueError, match="return_A must have shape"):
        value_loss(x, x, x[:2], normalizer=1.0)
    with pytest.raises(ValueError, match=r"value_loss: normalizer must be a number or on cpu .* got meta"):
        value_loss(x, x, x, normalizer=torch.ones((), device="meta"))
