"""value_loss: the recipe's formula, its clip, its mask, and enough statistics for the explained variance."""

import pytest
import torch

from icegrt.kernels import value_loss


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
