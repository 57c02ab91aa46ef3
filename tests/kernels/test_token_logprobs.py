"""token_logprobs: every known way that fused log-probs went wrong, on the reference."""

import pytest
import torch

from icegrt.kernels import VocabShard, token_logprobs
from tests.helpers.kernel_cases import assert_within_budget, plain_logprobs


@pytest.mark.parametrize("V", [1, 7, 1000, 32003, 152064])
def test_vocabulary_that_is_no_multiple_of_a_tile(V):
    torch.manual_seed(V)
    logits = torch.randn(3, V) * 10
    labels = torch.randint(0, V, (3,))
    logits[0, labels[0]] += 100  # peaked: a stray exp(0) would push the log-prob above 0
    out = token_logprobs(logits, labels, entropy=True)
    truth, plain = plain_logprobs(logits.double(), labels), plain_logprobs(logits, labels)
    assert (out.logprob_A <= 0).all()
    assert_within_budget(out.logprob_A, plain[0], truth[0], 1e-6)
    assert_within_budget(out.entropy_A, plain[1], truth[1], 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_low_precision_logits_are_widened_before_temperature_and_sum(dtype, temperature):
    torch.manual_seed(0)
    logits = (torch.randn(16, 1003) * 4).to(dtype)
    labels = torch.randint(0, 1003, (16,))
    out = token_logprobs(logits, labels, temperature=temperature)
    truth, _ = plain_logprobs(logits.double(), labels, temperature)
    assert out.logprob_A.dtype == torch.float32
    assert (out.logprob_A.double() - truth).abs().max() < 1e-5


def test_running_maximum_of_all_negative_logits():
    logits = torch.randn(4, 100) - 1e4
    labels = torch.arange(4)
    out = token_logprobs(logits, labels, entropy=True)
    assert_within_budget(out.logprob_A, *[plain_logprobs(x, labels)[0] for x in (logits, logits.double())], 1e-6)
    assert torch.isfinite(out.entropy_A).all()


def test_infinite_logits_forward_and_backward():
    torch.manual_seed(0)
    logits = torch.randn(4, 9, dtype=torch.float64)
    logits[:, ::2] = -torch.inf
    logits[3, 1:] = -torch.inf
    logits[3, 0] = 2.0  # one finite logit: log-prob 0, entropy 0
    labels = torch.tensor([1, 3, 0, 0])  # the third label itself is at -inf
    logits.requires_grad_()
    out = token_logprobs(logits, labels, entropy=True)
    assert out.logprob_A[2] == -torch.inf and out.logprob_A[3] == 0 and out.entropy_A[3] == 0
    (out.logprob_A[[0, 1, 3]].sum() + out.entropy_A.sum()).backward()
    assert torch.isfinite(logits.grad).all()
    finite = logits.detach()[:2, 1::2].clone().requires_grad_()
    inner = token_logprobs(finite, labels[:2] // 2, entropy=True)
    (inner.logprob_A.sum() + inner.entropy_A.sum()).backward()
    torch.testing.assert_close(logits.grad[:2, 1::2], finite.grad)
    assert (logits.grad[:, ::2][:2] == 0).all()


def test_ignored_labels_are_zero_whatever_the_row_holds():
    logits = torch.randn(3, 5)
    logits[1] = torch.nan
    logits.requires_grad_()
    out = token_logprobs(logits, torch.tensor([2, -100, 4]), entropy=True)
    assert out.logprob_A[1] == 0 and out.entropy_A[1] == 0
    (out.logprob_A.sum() + out.entropy_A.sum()).backward()
    assert (logits.grad[1] == 0).all() and torch.isfinite(logits.grad).all()


def test_gradient_under_random_upstream_gradients():
    torch.manual_seed(0)
    logits = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 5, -100, 2, 3], dtype=torch.int32)

    def logprob_and_entropy(logits):
        out = token_logprobs(logits, labels, temperature=0.7, entropy=True)
        return out.logprob_A, out.entropy_A

    assert torch.autograd.gradcheck(logprob_and_entropy, logits)


def test_strided_views_and_stride_zero_gradients():
    torch.manual_seed(0)
    base = torch.randn(12, 8)
    labels = torch.randint(0, 6, (8,))
    for view in (base.t()[:, :6], base[:8, 1:7], base[::1].t()[:, ::2]):
        dense, strided = view.clone().contiguous().requires_grad_(), view.detach().requires_grad_()
        outs = [token_logprobs(leaf, labels.clamp(max=view.shape[1] - 1)) for leaf in (dense, strided)]
        assert torch.equal(outs[0].logprob_A, outs[1].logprob_A)
        for out in outs:
            out.logprob_A.backward(torch.ones(()).expand(8))
        assert torch.equal(dense.grad, strided.grad)


def test_padding_columns_never_count():
    logits = torch.randn(4, 12, requires_grad=True)
    labels = torch.tensor([0, 9, 3, 4])
    shard = VocabShard(group=None, start=0, size=12, vocab_size=10)
    out = token_logprobs(logits, labels, entropy=True, shard=shard)
    plain = token_logprobs(logits[:, :10], labels, entropy=True)
    assert torch.equal(out.logprob_A, plain.logprob_A) and torch.equal(out.entropy_A, plain.entropy_A)
    out.logprob_A.sum().backward()
    assert (logits.grad[:, 10:] == 0).all()


def test_empty_stream_and_dtypes():
    out = token_logprobs(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long), entropy=True)
    assert out.logprob_A.shape == (0,) and out.entropy_A.shape == (0,)
    logits = torch.zeros(2, 3)
    assert token_logprobs(logits, torch.zeros(2, dtype=torch.long), temperature=0.5).logprob_A.dtype == torch.float32
    assert token_logprobs(logits, torch.zeros(2, dtype=torch.long)).entropy_A is None


def test_same_bits_twice_and_alone_or_in_a_batch():
    logits = torch.randn(64, 777)
    labels = torch.randint(0, 777, (64,))
    logprob = token_logprobs(logits, labels).logprob_A
    assert torch.equal(logprob, token_logprobs(logits, labels).logprob_A)
    alone = torch.cat([token_logprobs(logits[i : i + 1], labels[i : i + 1]).logprob_A for i in range(64)])
    assert torch.equal(logprob, alone)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "logits_AV must be floating", {"logits_AV": torch.zeros(2, 3, dtype=torch.long)}),
        (ValueError, "labels_A must have shape", {"labels_A": torch.zeros(3, dtype=torch.long)}),
        (TypeError, "labels_A must be int32 or int64", {"labels_A": torch.zeros(2)}),
        (ValueError, "labels_A must lie in", {"labels_A": torch.tensor([0, 3])}),
        (ValueError, "labels_A must lie in", {"labels_A": torch.tensor([-1, 0])}),
        (ValueError, "temperature must be finite and > 0", {"temperature": 0.0}),
        (ValueError, "shard.size", {"shard": VocabShard(None, 0, 4, 4)}),
    ],
)
def test_errors_name_the_argument(error, match, change):
    arguments = {"logits_AV": torch.zeros(2, 3), "labels_A": torch.zeros(2, dtype=torch.long)} | change
    with pytest.raises(error, match=match):
        token_logprobs(arguments.pop("logits_AV"), arguments.pop("labels_A"), **arguments)
