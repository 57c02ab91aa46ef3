"""linear_logprobs: the head without a logit matrix, against fp64 and against its own gradient in fp64."""

import pytest
import torch

from icegrt.kernels import VocabShard, linear_logprobs, use_backend
from icegrt.kernels.linear import products as linear_products
from tests.helpers.kernel_cases import plain_logprobs


@pytest.fixture(autouse=True, params=["cpp", "chunked"])
def backend(request):
    """Run every test with each backend of a CPU that has chunks."""
    with use_backend(linear_logprobs=request.param):
        yield request.param


def problem(A=13, H=5, V=11, dtype=torch.float64):
    hidden, weight = torch.randn(A, H, dtype=dtype), torch.randn(V, H, dtype=dtype)
    labels = torch.randint(0, V, (A,))
    return hidden.requires_grad_(), weight.requires_grad_(), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_error_against_fp64_is_below_1e_5(dtype, temperature):
    hidden, weight, labels = torch.randn(40, 64).to(dtype), (torch.randn(1003, 64) * 0.3).to(dtype), torch.arange(40)
    out = linear_logprobs(hidden, weight, labels, temperature=temperature, entropy=True, chunk_rows=16)
    logprob, entropy = plain_logprobs(hidden.double() @ weight.double().t(), labels, temperature)
    assert out.logprob_A.dtype == torch.float32
    assert (out.logprob_A.double() - logprob).abs().max() < 1e-5
    assert (out.entropy_A.double() - entropy).abs().max() < 1e-5


@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
def test_gradient_under_random_upstream_gradients(chunk_rows):
    hidden, weight, labels = problem()
    labels[3] = -100
    mask = torch.ones(13)
    mask[5] = 0

    def logprob_and_entropy(hidden_leaf, weight_leaf):
        out = linear_logprobs(
            hidden_leaf,
            weight_leaf,
            labels,
            mask_A=mask,
            temperature=0.7,
            entropy=True,
            chunk_rows=chunk_rows,
            shard=VocabShard(None, 0, 11, 11),
        )
        return out.logprob_A, out.entropy_A

    assert torch.autograd.gradcheck(logprob_and_entropy, (hidden, weight))


def test_masked_and_ignored_rows_never_count_whatever_they_hold():
    hidden, weight, labels = problem()
    labels[3] = -100
    with torch.no_grad():
        hidden[3], hidden[5] = torch.nan, torch.nan
    mask = torch.ones(13, dtype=torch.bool)
    mask[5] = False
    for mask_A in (mask, None):
        if mask_A is None:
            labels[5] = -100
        hidden.grad = weight.grad = None
        out = linear_logprobs(hidden, weight, labels, mask_A=mask_A, entropy=True)
        out.logprob_A.sum().backward()
        for x in (out.logprob_A[[3, 5]], out.entropy_A[[3, 5]], hidden.grad[[3, 5]]):
            assert (x == 0).all()
        assert torch.isfinite(weight.grad).all()


def test_mask_drops_rows_before_the_head(monkeypatch):
    product_rows = []
    product = linear_products.product

    def recorded_product(a, b, out):
        product_rows.append(a.shape[0])
        return product(a, b, out)

    monkeypatch.setattr(linear_products, "product", recorded_product)
    hidden, weight, labels = problem()
    linear_logprobs(hidden.detach(), weight.detach(), labels, mask_A=torch.arange(13) < 6, chunk_rows=4)
    assert product_rows == [4, 2]


def test_weight_gradient_accumulates_in_fp32_into_the_callers_buffer():
    hidden, weight, labels = problem(A=512, H=8, V=6, dtype=torch.bfloat16)
    buffer = torch.full((6, 8), 2.0)
    linear_logprobs(hidden, weight, labels, chunk_rows=4, weight_grad_out=buffer).logprob_A.sum().backward()
    assert weight.grad is None and weight.grad_added_to_main_grad
    wide_hidden, wide_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    linear_logprobs(wide_hidden, wide_weight, labels).logprob_A.sum().backward()
    # 128 chunks added in bf16 would be off by 1%.
    assert (buffer.double() - 2 - wide_weight.grad).norm() / wide_weight.grad.norm() < 1e-5


def test_frozen_inputs_and_no_grad_form_no_gradient(monkeypatch):
    hidden, weight, labels = problem()
    for frozen_hidden in (True, False):
        hidden_leaf = hidden.detach().requires_grad_(not frozen_hidden)
        weight_leaf = weight.detach().requires_grad_(frozen_hidden)
        linear_logprobs(hidden_leaf, weight_leaf, labels).logprob_A.sum().backward()
        assert (hidden_leaf.grad is None) == frozen_hidden and (weight_leaf.grad is None) != frozen_hidden
    with torch.no_grad():
        assert not linear_logprobs(hidden, weight, labels).logprob_A.requires_grad


def test_padding_rows_of_the_weight_never_count():
    hidden, weight, labels = problem(V=12)
    labels = labels.clamp(max=9)
    padded = linear_logprobs(hidden, weight, labels, shard=VocabShard(None, 0, 12, 10))
    plain = linear_logprobs(hidden, weight[:10], labels)
    assert torch.equal(padded.logprob_A, plain.logprob_A)
    padded.logprob_A.sum().backward()
    assert (weight.grad[10:] == 0).all()


def test_views_empty_streams_and_default_chunks():
    hidden, weight, labels = problem(A=12, H=6)
    base = torch.randn(6, 24, dtype=torch.float64)
    view = base.t()[::2]
    strided, dense = (linear_logprobs(x, weight, labels).logprob_A for x in (view, view.contiguous()))
    torch.testing.assert_close(strided, dense, rtol=0, atol=1e-12)
    empty = linear_logprobs(hidden[:0], weight, labels[:0], entropy=True)
    empty.logprob_A.sum().backward()
    assert empty.entropy_A.shape == (0,) and (weight.grad == 0).all()
    assert linear_products.default_chunk_rows(152064) == 32
    assert linear_products.default_chunk_rows(7) == linear_products.CHUNK_ROWS_MAX["cpu"]
    assert linear_products.default_chunk_rows(152064, "cuda") == 2048
    assert linear_products.default_chunk_rows(152064, "cuda", free_bytes=64 << 30) == 4096
    assert linear_products.default_chunk_rows(152064, "cuda", free_bytes=3 << 30) == 512


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("weight_VH must have shape", {"weight_VH": torch.zeros(4, 3)}),
        ("chunk_rows must be an int", {"chunk_rows": 0}),
        ("weight_grad_out must be a torch.float32", {"weight_grad_out": torch.zeros(4, 2, dtype=torch.bfloat16)}),
        ("labels_A must lie in", {"labels_A": torch.tensor([0, 4])}),
        ("mask_A must have shape", {"mask_A": torch.ones(3)}),
    ],
)
def test_errors_name_the_argument(match, change):
    arguments = {"hidden_AH": torch.zeros(2, 2), "weight_VH": torch.zeros(4, 2), "labels_A": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=match):
        linear_logprobs(**(arguments | change))
