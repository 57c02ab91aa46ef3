"""masked_moments and whiten: Chan's rule, degenerate sets, masks."""

import pytest
import torch

from icegrt.kernels import Moments, masked_moments, value_loss, whiten


def test_moments_of_parts_merge_to_those_of_the_whole():
    x = torch.randn(1000) * 3 + 1e4  # a mean far from 0: sums of squares would lose every digit
    moments = masked_moments(x)
    part_moments = [masked_moments(p) for p in (x[:1], x[1:1], x[1:400], x[400:])]
    merged = part_moments[0]
    for part in part_moments[1:]:
        merged = merged.merge(part)
    assert merged.count == 1000
    for measured in (moments, merged):
        torch.testing.assert_close(measured.mean, x.double().mean())
        torch.testing.assert_close(measured.variance, x.double().var(correction=0))


def test_masked_nan_has_no_effect():
    x, mask = torch.randn(50), torch.rand(50) > 0.5
    dirty = torch.where(mask, x, torch.nan)
    masked, dropped = masked_moments(dirty, mask), masked_moments(x[mask])
    assert masked == masked_moments(x, mask)
    for name in ("count", "mean", "m2"):
        torch.testing.assert_close(getattr(masked, name), getattr(dropped, name), rtol=1e-12, atol=1e-12)


def test_one_element_and_none():
    single = masked_moments(torch.tensor([3.0]))
    assert single.variance == 0 and (whiten(torch.tensor([3.0]), single) == 0).all()
    empty = masked_moments(torch.zeros(0))
    assert empty.count == 0 and empty.variance == 0 and whiten(torch.zeros(0), empty).shape == (0,)


def test_whiten_with_and_without_the_mean():
    x = torch.randn(200) * 5 + 3
    moments = masked_moments(x)
    white = whiten(x, moments)
    assert white.dtype == torch.float32
    assert abs(white.mean()) < 1e-5 and white.var(correction=0).item() == pytest.approx(1, abs=1e-5)
    unshifted = whiten(x, moments, shift_mean=False)
    assert unshifted.mean().item() == pytest.approx(x.mean().item(), abs=1e-4)


@pytest.mark.parametrize("shift", [True, False])
def test_bessels_variance(shift):
    x, mask = torch.randn(5), torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    kept = x[mask != 0].double()
    white = whiten(x, masked_moments(x, mask), shift_mean=shift, eps=0.0, correction=1)
    expected = (x.double() - kept.mean()) / kept.std(correction=1) + (0 if shift else kept.mean())
    torch.testing.assert_close(white.double(), expected, rtol=1e-6, atol=1e-6)
    single = masked_moments(torch.tensor([3.0]))
    assert whiten(torch.tensor([3.0]), single, correction=1) == 0
    with pytest.raises(ValueError, match="whiten: correction must be 0 or 1, got 2"):
        whiten(x, single, correction=2)


def test_moments_vary_beyond_rounding_only():
    for constant in (0.1, -3e8, 0.0):
        assert not masked_moments(torch.full((1000,), constant)).varies
        assert not masked_moments(torch.full((1000,), constant, dtype=torch.float64)).varies
    assert not masked_moments(torch.zeros(0)).varies
    assert masked_moments(1e6 + 1e-3 * torch.randn(100, dtype=torch.float64)).varies
    assert masked_moments(torch.tensor([0.0, 1e-30])).varies
    assert masked_moments(torch.tensor([1.0, torch.nan])).varies  # what it divides is NaN, not a constant


@pytest.mark.parametrize("bad", [0.5, -1.0, torch.nan])
def test_masks_do_not_weigh(bad):
    with pytest.raises(ValueError, match=r"mask must be 0 or 1 where it is floating point .* at row \[1, 0\]"):
        masked_moments(torch.ones(2, 2), torch.tensor([[1.0, 0.0], [bad, 1.0]]))
    with pytest.raises(ValueError, match=r"mask_A must be 0 or 1 where it is floating point .* at row 1"):
        value_loss(torch.ones(2), None, torch.ones(2), clip=None, normalizer=1.0, mask_A=torch.tensor([1.0, bad]))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="mask must have shape"):
        masked_moments(torch.zeros(3), torch.ones(2))
    with pytest.raises(TypeError, match="moments must be Moments"):
        whiten(torch.zeros(3), None)
    with pytest.raises(TypeError, match="x must be floating"):
        masked_moments(torch.zeros(3, dtype=torch.long))
    assert isinstance(masked_moments(torch.zeros(2, 2)), Moments)
    meta_moments = Moments(*torch.ones(3).unbind()).to("meta")
    with pytest.raises(ValueError, match=r"whiten: moments must be on cpu .* got meta"):
        whiten(torch.zeros(3), meta_moments)
    with pytest.raises(ValueError, match="mask must be on cpu"):
        masked_moments(torch.zeros(3), torch.ones(3, device="meta"))
