"""token_logprobs in Triton under the interpreter (run by test_token_logprobs_triton.py).

The interpreter truncates where a device rounds to bf16, so low precision is only an input here, never asserted on.
"""

import pytest
import torch
from kernel_cases import assert_within_budget, plain_logprobs

from icegrt.kernels import VocabShard, record_launches, token_logprobs, use_backend
from icegrt.kernels import token_logprobs as op

BOTH = [("token_logprobs_forward", "triton"), ("token_logprobs_backward", "triton")]


def both_directions(logits, labels, g, h, **options):
    """(log-prob, entropy, d logits) of Triton, which really ran, for upstream gradients g and h."""
    leaf = logits.detach().requires_grad_()
    with use_backend("triton"), record_launches() as launches:
        out = op(leaf, labels, entropy=True, **options)
        torch.autograd.backward([out.logprob_A, out.entropy_A], [g, h])
    assert launches == BOTH
    return out.logprob_A, out.entropy_A, leaf.grad


@pytest.mark.parametrize("V", [7, 1000, 32003, 152064])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_error_budget(V, temperature):
    torch.manual_seed(V)
    logits, labels = torch.randn(3, V) * 8, torch.randint(0, V, (3,))
    logits[0, labels[0]] += 100
    g, h = torch.randn(3), torch.randn(3)
    ours = both_directions(logits, labels, g, h, temperature=temperature)
    assert (ours[0] <= 0).all()
    answers = []
    for dtype in (torch.float32, torch.float64):
        leaf = logits.to(dtype, copy=True).requires_grad_()
        out = plain_logprobs(leaf, labels, temperature)
        torch.autograd.backward(out, [g.to(dtype), h.to(dtype)])
        answers.append((*out, leaf.grad))
    for mine, plain, truth, atol in zip(ours, *answers, (1e-6, 1e-5, 1e-6), strict=True):
        assert_within_budget(mine, plain, truth, atol)


def test_bf16_logits_are_widened():
    logits, labels = (torch.randn(4, 1003) * 4).bfloat16(), torch.arange(4)
    with use_backend("triton"):
        out = token_logprobs(logits, labels, temperature=0.7)
    assert (out.logprob_A.double() - plain_logprobs(logits.double(), labels, 0.7)[0]).abs().max() < 1e-5


def test_row_offsets_beyond_int32():
    # Rows 2^30 elements apart in an untouched (virtual) buffer: row 2 lies past 2^31.
    try:
        store = torch.empty((1 << 31) + (1 << 20), dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no 4 GiB of address space")
    wide = store.as_strided((3, 300), ((1 << 30) + 8, 1))
    wide.copy_(torch.randn(3, 300))
    labels = torch.tensor([1, 2, 299])
    ours = both_directions(wide, labels, torch.ones(3), torch.zeros(3))
    truth = plain_logprobs(wide.double(), labels)
    assert (ours[0].double() - truth[0]).abs().max() < 1e-5
    assert torch.isfinite(ours[2]).all() and ours[2][2].abs().sum() > 0


def test_negative_infinite_ignored_and_nan_rows_into_poisoned_outputs(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda x, **k: empty(x.shape, dtype=x.dtype).fill_(torch.nan))
    logits = torch.randn(5, 37)
    logits[0] -= 1e4
    logits[1, ::2] = -torch.inf
    logits[2] = torch.nan
    logits[3, :36] = -torch.inf
    labels = torch.tensor([3, 1, -100, 36, 0])
    logprob, entropy, grad = both_directions(logits, labels, torch.randn(5), torch.randn(5))
    for x in (logprob, entropy, grad):
        assert torch.isfinite(x).all()
    assert logprob[2] == 0 and entropy[2] == 0 and (grad[2] == 0).all()
    truth = plain_logprobs(logits.double()[[0, 1, 3, 4]], labels[[0, 1, 3, 4]])
    assert (logprob[[0, 1, 3, 4]].double() - truth[0]).abs().max() < 1e-5


def test_rows_without_upstream_gradient_are_zero():
    logits = torch.randn(4, 50)
    g = torch.tensor([0.0, 1.0, 0.0, 2.0])
    _, _, grad = both_directions(logits, torch.arange(4), g, torch.zeros(4))
    assert (grad[[0, 2]] == 0).all() and (grad[[1, 3]] != 0).all()


def test_strided_views_and_expanded_gradients():
    base = torch.randn(64, 9)
    labels = torch.randint(0, 31, (9,))
    for view in (base.t()[:, 1:33], base.t()[:, ::2]):
        one = torch.ones(()).expand(9)
        loose = both_directions(view, labels, one, one)
        dense = both_directions(view.contiguous(), labels, one, one)
        assert all(torch.equal(a, b) for a, b in zip(loose, dense, strict=True))


def test_padding_columns_never_count():
    logits, labels = torch.randn(3, 40), torch.tensor([0, 32, 7])
    shard = VocabShard(None, 0, 40, 33)
    padded = both_directions(logits, labels, torch.ones(3), torch.ones(3), shard=shard)
    plain = both_directions(logits[:, :33], labels, torch.ones(3), torch.ones(3))
    torch.testing.assert_close(padded[0], plain[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(padded[2][:, :33], plain[2], rtol=0, atol=1e-6)
    assert (padded[2][:, 33:] == 0).all()


def test_same_bits_twice_alone_or_in_a_batch_and_empty():
    logits, labels = torch.randn(6, 5000), torch.randint(0, 5000, (6,))
    with use_backend("triton"):
        whole = token_logprobs(logits, labels).logprob_A
        assert torch.equal(whole, token_logprobs(logits, labels).logprob_A)
        assert torch.equal(whole[4:5], token_logprobs(logits[4:5], labels[4:5]).logprob_A)
        assert token_logprobs(logits[:0], labels[:0]).logprob_A.shape == (0,)


def test_auto_leaves_cpu_tensors_to_the_reference():
    with record_launches() as launches:
        token_logprobs(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long))
    assert launches == []
