"""Rows that the caller names, and a gradient buffer that no backward would fill."""

import pytest
import torch

from icegrt.kernels import linear_logprobs, linear_ppo_loss, use_backend
from icegrt.kernels.linear.products import ChunkedHead

A, H, V, CHUNK = 23, 8, 31, 5


def inputs(masked):
    generator = torch.Generator().manual_seed(0)
    hidden_AH = torch.randn(A, H, generator=generator).requires_grad_()
    weight_VH = torch.randn(V, H, generator=generator).requires_grad_()
    labels_A = torch.randint(V, (A,), generator=generator)
    mask_A = torch.rand(A, generator=generator) < 0.6 if masked else None
    return hidden_AH, weight_VH, labels_A, mask_A


def logprobs(hidden_AH, weight_VH, labels_A, mask_A, **options):
    out = linear_logprobs(hidden_AH, weight_VH, labels_A, mask_A=mask_A, entropy=True, chunk_rows=CHUNK, **options)
    return out.logprob_A.sum() + 0.1 * out.entropy_A.sum()


def policy(hidden_AH, weight_VH, labels_A, mask_A, **options):
    generator = torch.Generator().manual_seed(1)
    old_A, advantage_A = torch.randn(2, A, generator=generator)
    return linear_ppo_loss(
        hidden_AH,
        weight_VH,
        labels_A,
        old_A - 3,
        advantage_A,
        mask_A=mask_A,
        normalizer=3.0,
        chunk_rows=CHUNK,
        **options,
    ).loss


@pytest.mark.parametrize("operation", [logprobs, policy])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("backend", ["cpp", "chunked", "triton", "reference"])
def test_named_rows_change_no_bit(operation, masked, backend):
    results = []
    for is_named in (False, True):
        hidden_AH, weight_VH, labels_A, mask_A = inputs(masked)
        rows_R = slice(None) if mask_A is None else mask_A.nonzero().squeeze(1)
        with use_backend(backend):
            loss = operation(hidden_AH, weight_VH, labels_A, mask_A, **({"rows_R": rows_R} if is_named else {}))
            loss.backward()
        results.append((loss.detach(), hidden_AH.grad, weight_VH.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("operation", [logprobs, policy])
def test_named_rows_must_be_those_that_count(operation):
    hidden_AH, weight_VH, labels_A, mask_A = inputs(True)
    rows_R = mask_A.nonzero().squeeze(1)
    for wrong in (rows_R[1:], torch.arange(A), slice(None)):
        with pytest.raises(ValueError, match=r"rows_R must be the rows that mask_A and labels_A keep; .* row"):
            operation(hidden_AH, weight_VH, labels_A, mask_A, rows_R=wrong)
    labels_A[3] = -100
    with pytest.raises(ValueError, match="differ at row 3"):
        operation(hidden_AH, weight_VH, labels_A, None, rows_R=slice(None))
    with pytest.raises(ValueError, match="rows_R must be an index tensor"):
        operation(hidden_AH, weight_VH, labels_A, None, rows_R=slice(2, 5))


@pytest.mark.parametrize("operation", [logprobs, policy])
def test_a_buffer_is_refused_where_no_backward_can_follow(operation):
    hidden_AH, weight_VH, labels_A, mask_A = inputs(True)
    buffer_VH = torch.zeros(V, H)
    with torch.no_grad(), pytest.raises(ValueError, match="weight_grad_out must be None where no backward can follow"):
        operation(hidden_AH, weight_VH, labels_A, mask_A, weight_grad_out=buffer_VH)
    with pytest.raises(ValueError, match="weight_grad_out must be None where no backward can follow"):
        operation(hidden_AH, weight_VH.detach(), labels_A, mask_A, weight_grad_out=buffer_VH)
    assert not buffer_VH.any()


def test_rows_without_a_gradient_may_stay_in_the_products_of_a_device():
    original = ChunkedHead.of.__func__
    results = []
    for drop in (True, False):
        # On a CPU rows are always dropped; the head of a device is what `of` returns there.
        def of(cls, head, entropy, drop=drop):
            chunked = original(cls, head, entropy)
            chunked.drop_inactive = drop
            return chunked

        hidden_AH, weight_VH, labels_A, _ = inputs(False)
        with pytest.MonkeyPatch.context() as patch, use_backend("chunked"):
            patch.setattr(ChunkedHead, "of", classmethod(of))
            loss = policy(hidden_AH, weight_VH, labels_A, None)
            loss.backward()
        results.append((loss.detach(), hidden_AH.grad, weight_VH.grad))
    (loss, dx, dw), (kept_loss, kept_dx, kept_dw) = results
    assert (dx == 0).all(1).any()  # some rows are clipped
    assert torch.equal(loss, kept_loss)
    torch.testing.assert_close(kept_dx, dx, rtol=0, atol=1e-6)
    torch.testing.assert_close(kept_dw, dw, rtol=0, atol=1e-5)
