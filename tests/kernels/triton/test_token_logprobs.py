"""token_logprobs in Triton under the interpreter.

The interpreter truncates where a device rounds to bf16, so low precision is only an input here, never asserted on.
"""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icegrt.kernels import VocabShard, record_launches, token_logprobs, use_backend
from tests.helpers.kernel_cases import assert_within_budget, plain_logprobs, virtual_rows

FORWARD_AND_BACKWARD = [("token_logprobs_forward", "triton"), ("token_logprobs_backward", "triton")]


def forward_and_backward(logits, labels, grad_logprob, grad_entropy, **options):
    """Return log-prob, entropy and d logits of Triton, which really ran, for these upstream gradients."""
    leaf = logits.detach().requires_grad_()
    with use_backend("triton"), record_launches() as launches:
        out = token_logprobs(leaf, labels, entropy=True, **options)
        torch.autograd.backward([out.logprob_A, out.entropy_A], [grad_logprob, grad_entropy])
    assert launches == FORWARD_AND_BACKWARD
    return out.logprob_A, out.entropy_A, leaf.grad


@pytest.mark.parametrize("V", [7, 1000, 32003, 152064])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_error_budget(V, temperature):
    torch.manual_seed(V)
    logits, labels = torch.randn(3, V) * 8, torch.randint(0, V, (3,))
    logits[0, labels[0]] += 100
    upstream = torch.randn(3), torch.randn(3)
    fused_results = forward_and_backward(logits, labels, *upstream, temperature=temperature)
    assert (fused_results[0] <= 0).all()
    references = []
    for dtype in (torch.float32, torch.float64):
        leaf = logits.to(dtype, copy=True).requires_grad_()
        out = plain_logprobs(leaf, labels, temperature)
        torch.autograd.backward(out, [grad.to(dtype) for grad in upstream])
        references.append((*out, leaf.grad))
    for fused, plain, truth, atol in zip(fused_results, *references, (1e-6, 1e-5, 1e-6), strict=True):
        assert_within_budget(fused, plain, truth, atol)


@given(
    A=st.sampled_from([0, 1, 5]),
    V=st.sampled_from([1, 2, 31, 33, 1025, 8193]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    temperature=st.sampled_from([1.0, 0.7, 30.0]),
    scale=st.sampled_from([0.0, 3.0, 100.0]),
    shift=st.sampled_from([0.0, -1e4, 1e4]),
    strided=st.booleans(),
    infinite=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_drawn_logits(A, V, dtype, temperature, scale, shift, strided, infinite, seed):
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(A, 2 * V, generator=generator) * scale + shift).to(dtype)
    logits = base[:, ::2] if strided else base[:, :V]
    labels = torch.randint(0, V, (A,), generator=generator)
    if infinite:  # but never at the label, where log-prob and budget would be infinite
        logits = logits.masked_fill(torch.arange(V) % 3 == 0, -torch.inf)
        logits = logits.scatter(1, labels[:, None], shift)
    labels[:1] = -100
    upstream = torch.randn(2, A, generator=generator)
    with use_backend("triton"):
        leaf = logits.to(torch.float32, copy=True).requires_grad_()  # the interpreter truncates bf16
        out = token_logprobs(leaf, labels, entropy=True, temperature=temperature)
        torch.autograd.backward([out.logprob_A, out.entropy_A], [*upstream])
        low = token_logprobs(logits, labels, entropy=True, temperature=temperature)
    assert torch.equal(low.logprob_A, out.logprob_A) and torch.equal(low.entropy_A, out.entropy_A)
    references = []
    for reference_dtype in (torch.float32, torch.float64):
        with use_backend("reference"):
            reference_leaf = logits.to(reference_dtype, copy=True).requires_grad_()
            plain_out = token_logprobs(reference_leaf, labels, entropy=True, temperature=temperature)
        torch.autograd.backward([plain_out.logprob_A, plain_out.entropy_A], [*upstream.to(reference_dtype)])
        references.append((plain_out.logprob_A, plain_out.entropy_A, reference_leaf.grad))
    for fused, plain, truth in zip((out.logprob_A, out.entropy_A, leaf.grad), *references, strict=True):
        assert_within_budget(fused, plain, truth, atol=1e-5)


def test_bf16_logits_are_widened():
    logits, labels = (torch.randn(4, 1003) * 4).bfloat16(), torch.arange(4)
    with use_backend("triton"):
        out = token_logprobs(logits, labels, temperature=0.7)
    assert (out.logprob_A.double() - plain_logprobs(logits.double(), labels, 0.7)[0]).abs().max() < 1e-5


def test_row_offsets_beyond_int32():
    check_row_offsets_beyond_int32()


def check_row_offsets_beyond_int32():
    """Rows 2^30 elements apart in untouched (virtual) memory: row 2 lies past 2^31, and where it would wrap to is 0."""
    logits = virtual_rows(300)
    logits.copy_(torch.randn(3, 300))
    labels = torch.tensor([1, 2, 299])
    logprob, _, grad = forward_and_backward(logits, labels, torch.ones(3), torch.zeros(3))
    truth, _ = plain_logprobs(logits.double(), labels)
    assert (logprob.double() - truth).abs().max() < 1e-5
    assert torch.isfinite(grad).all() and grad[2].abs().sum() > 0


def check_all_negative_logits():
    logits, labels = torch.randn(4, 100) - 1e4, torch.arange(4)
    *fused_results, grad = forward_and_backward(logits, labels, torch.ones(4), torch.ones(4))
    assert torch.isfinite(grad).all()
    plain_results, truths = plain_logprobs(logits, labels), plain_logprobs(logits.double(), labels)
    for fused, plain, truth in zip(fused_results, plain_results, truths, strict=True):
        assert_within_budget(fused, plain, truth, 1e-5)


def check_infinite_logits():
    """-inf at some columns, in whole blocks before the first finite logit, and at all but one column."""
    logits = torch.randn(3, 9000)
    logits[0, ::2] = -torch.inf
    logits[1, :8500] = -torch.inf
    logits[2, :8999] = -torch.inf
    labels = torch.tensor([1, 8600, 8999])
    *fused_results, grad = forward_and_backward(logits, labels, torch.ones(3), torch.ones(3))
    for fused, truth in zip(fused_results, plain_logprobs(logits.double(), labels), strict=True):
        assert (fused.double() - truth).abs().max() < 1e-5, fused
    assert torch.isfinite(grad).all() and (grad[logits == -torch.inf] == 0).all()


def check_a_maximum_that_rises():
    """From block to block by as much as fp32's exponent can tell apart."""
    logits = torch.randn(2, 13000) + torch.arange(13000) * 0.01
    labels = torch.tensor([0, 12999])
    fused_results = forward_and_backward(logits, labels, torch.ones(2), torch.ones(2))[:2]
    plain_results, truths = plain_logprobs(logits, labels), plain_logprobs(logits.double(), labels)
    for fused, plain, truth in zip(fused_results, plain_results, truths, strict=True):
        assert_within_budget(fused, plain, truth, 1e-5)


def check_ignored_rows_are_written():
    """Outputs are poisoned first: what a kernel leaves unwritten reads as NaN."""
    logits = torch.randn(5, 37)
    logits[2] = torch.nan
    labels = torch.tensor([3, 1, -100, 36, 0])
    with poisoned_buffers():
        logprob, entropy, grad = forward_and_backward(logits, labels, torch.randn(5), torch.randn(5))
    for x in (logprob, entropy, grad):
        assert torch.isfinite(x).all() and (x[2] == 0).all()


@contextlib.contextmanager
def poisoned_buffers():
    empty = torch.empty
    torch.empty = lambda *a, **k: x.fill_(torch.nan) if (x := empty(*a, **k)).is_floating_point() else x
    try:
        yield
    finally:
        torch.empty = empty


def check_rows_without_gradient_are_not_read():
    """Their logits turn into NaN after the forward: a kernel that reads them multiplies NaN by 0."""
    logits = torch.randn(4, 50)
    leaf = logits.clone().requires_grad_()
    with use_backend("triton"):
        out = token_logprobs(leaf, torch.tensor([0, 1, -100, 3]), entropy=True)
        leaf.data[[0, 2]] = torch.nan
        torch.autograd.backward([out.logprob_A, out.entropy_A], [torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.zeros(4)])
    assert (leaf.grad[[0, 2, 3]] == 0).all() and (leaf.grad[1] != 0).all()


def check_gradient_in_place():
    """The same bits as out of place, in the logits' own memory and strides; nothing beside them is touched."""
    base = torch.full((6, 40), 7.0)
    base[:, 3:36] = torch.randn(6, 33)
    labels, upstream = torch.tensor([0, 32, -100, 4, 5, 6]), torch.tensor([1.0, -2.0, 3.0, 0.0, 0.5, 1.0])
    expected = forward_and_backward(base[:, 3:36], labels, upstream, upstream)[2]
    memory = base.clone()
    view = memory[:, 3:36]
    leaf = torch.zeros(6, 33, requires_grad=True)
    logits = Overwrite.apply(leaf, view)
    with use_backend("triton"):
        out = token_logprobs(logits, labels, entropy=True, inplace_backward=True)
        torch.autograd.backward([out.logprob_A, out.entropy_A], [upstream, upstream])
    assert torch.equal(leaf.grad, expected) and torch.equal(view, expected)
    assert (memory[:, :3] == 7).all() and (memory[:, 36:] == 7).all()


class Overwrite(torch.autograd.Function):
    """A logit-producing operation that saves nothing: its output may be overwritten."""

    @staticmethod
    def forward(ctx, leaf, view):
        return view.view_as(view)

    @staticmethod
    def backward(ctx, grad):
        return grad.clone(), None


@pytest.mark.parametrize(
    "check",
    [
        check_all_negative_logits,
        check_infinite_logits,
        check_a_maximum_that_rises,
        check_ignored_rows_are_written,
        check_rows_without_gradient_are_not_read,
        check_gradient_in_place,
    ],
)
def test_hazard(check):
    check()


def test_whoever_saved_overwritten_logits_hears_of_it():
    leaf = torch.randn(3, 8, requires_grad=True)
    logits = leaf.exp()  # exp saves its output
    with use_backend("triton"):
        out = token_logprobs(logits, torch.arange(3), inplace_backward=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.logprob_A.sum().backward()
    for refused, match in ((leaf, "must not be a leaf"), (leaf[:1].expand(3, 8), "must not be expanded")):
        with pytest.raises(ValueError, match=match):
            token_logprobs(refused, torch.arange(3), inplace_backward=True)


def test_double_backward_is_refused_by_name():
    leaf = torch.randn(3, 8, requires_grad=True)
    with use_backend("triton"):
        loss = token_logprobs(leaf, torch.arange(3)).logprob_A.sum()
        with pytest.raises(RuntimeError, match="token_logprobs: double backward is not supported"):
            torch.autograd.grad(loss, leaf, create_graph=True)


def test_strided_views_and_expanded_gradients():
    base = torch.randn(64, 9)
    labels = torch.randint(0, 31, (9,))
    for view in (base.t()[:, 1:33], base.t()[:, ::2]):
        ones = torch.ones(()).expand(9)
        strided_results = forward_and_backward(view, labels, ones, ones)
        dense_results = forward_and_backward(view.contiguous(), labels, ones, ones)
        assert all(torch.equal(a, b) for a, b in zip(strided_results, dense_results, strict=True))


def test_padding_columns_never_count():
    logits, labels = torch.randn(3, 40), torch.tensor([0, 32, 7])
    shard = VocabShard(None, 0, 40, 33)
    padded = forward_and_backward(logits, labels, torch.ones(3), torch.ones(3), shard=shard)
    plain = forward_and_backward(logits[:, :33], labels, torch.ones(3), torch.ones(3))
    torch.testing.assert_close(padded[0], plain[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(padded[2][:, :33], plain[2], rtol=0, atol=1e-6)
    assert (padded[2][:, 33:] == 0).all()


def test_same_bits_twice_alone_or_in_a_batch_and_empty():
    logits, labels = torch.randn(6, 5000), torch.randint(0, 5000, (6,))
    with use_backend("triton"):
        logprob = token_logprobs(logits, labels).logprob_A
        assert torch.equal(logprob, token_logprobs(logits, labels).logprob_A)
        assert torch.equal(logprob[4:5], token_logprobs(logits[4:5], labels[4:5]).logprob_A)
        assert token_logprobs(logits[:0], labels[:0]).logprob_A.shape == (0,)


def test_auto_leaves_cpu_tensors_to_the_reference():
    with record_launches() as launches:
        token_logprobs(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long))
    assert launches == []
