"""Packed attention on CPUs: the formula and its gradients, bits of a sequence, views, and invalid arguments."""

import math

import pytest
import torch

from icegrt.kernels import packed_attention, record_launches, use_backend
from tests.helpers.kernel_cases import assert_within_budget

BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpp"])
# Lengths beside those of a block of queries and of a vector.
LENGTHS = [3, 1, 32, 33, 0, 70, 16, 3]


def streams(lengths=LENGTHS, key_lengths=None, heads=4, groups=2, width=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = (sum(lengths), sum(key_lengths or lengths), sum(key_lengths or lengths))
    counts = (heads, groups, groups)
    return [torch.randn(n, h, width, generator=generator).to(dtype) for n, h in zip(rows, counts, strict=True)]


def plain(q, k, v, lengths, key_lengths=None, window=None):
    """The formula, a sequence and a query at a time."""
    rows, row, key = [], 0, 0
    for n, n_keys in zip(lengths, key_lengths or lengths, strict=True):
        for i in range(n):
            last = key + n_keys - n + i + 1
            first = key if window is None else max(key, last - window)
            repeat = q.shape[1] // k.shape[1]
            keys, values = (x[first:last].repeat_interleave(repeat, dim=1) for x in (k, v))
            scores = torch.einsum("hd,thd->ht", q[row + i], keys) / math.sqrt(q.shape[2])
            rows.append(torch.einsum("ht,thd->hd", scores.softmax(-1), values))
        row, key = row + n, key + n_keys
    return torch.stack(rows)


def results(call, tensors, dtype=None):
    """The result, and the gradients by queries, keys and values."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    out = call(*leaves)
    generator = torch.Generator().manual_seed(5)
    upstream = torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def on(backend, *args, **options):
    def call(*tensors):
        with use_backend(backend):
            return packed_attention(*tensors, *args, **options)

    return call


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 2, 8), (3, 3, 64), (6, 1, 20), (1, 1, 1)])
@pytest.mark.parametrize("window", [None, 1, 5, 40, 100])
def test_formula_and_gradients(backend, dtype, heads, groups, width, window):
    tensors = streams(heads=heads, groups=groups, width=width, dtype=dtype)
    ours = results(on(backend, LENGTHS, window=window), tensors)
    formula = [lambda *x: plain(*x, LENGTHS, window=window)]
    theirs, exact = results(formula[0], tensors), results(formula[0], tensors, torch.float64)
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == dtype
        assert_within_budget(mine, other, truth, 2e-6 * max(1.0, truth.abs().max().item()))


@BACKENDS
@pytest.mark.parametrize("window", [None, 4, 36])
def test_queries_of_the_last_keys(backend, window):
    lengths, key_lengths = [3, 0, 40, 1], [10, 5, 90, 1]
    tensors = streams(lengths, key_lengths, dtype=torch.float64)
    ours = results(on(backend, lengths, key_lengths=key_lengths, window=window), tensors)
    exact = results(lambda *x: plain(*x, lengths, key_lengths, window), tensors)
    torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_a_sequence_depend_on_it_alone(dtype):
    tensors = streams(width=24, dtype=dtype)
    whole = results(on("cpp", LENGTHS), tensors)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 3)
        assert all(map(torch.equal, results(on("cpp", LENGTHS), tensors), whole))
    finally:
        torch.set_num_threads(threads)
    alone = slice(3 + 1 + 32, 3 + 1 + 32 + 33)
    assert torch.equal(on("cpp", [33])(*(x[alone] for x in tensors)), whole[0][alone])
    with torch.no_grad():
        assert torch.equal(on("cpp", LENGTHS)(*tensors), whole[0])


def test_heads_of_a_projection_are_read_in_place():
    projection = torch.randn(sum(LENGTHS), 2, 4, 8)
    q, k, v = projection[:, :, :2].flatten(1, 2), projection[:, :, 2], projection[:, :, 3]
    copies = [x.clone(memory_format=torch.contiguous_format) for x in (q, k, v)]
    assert torch.equal(on("cpp", LENGTHS)(q, k, v), on("cpp", LENGTHS)(*copies))
    transposed = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in copies]
    assert torch.equal(on("cpp", LENGTHS)(*transposed), on("cpp", LENGTHS)(*copies))


def test_peaked_and_equal_scores():
    """Scores around 1e4, where only the largest counts, and equal ones, whose result is a mean."""
    q, k, v = streams([40])
    ours = on("cpp", [40])(q * 100, k * 100, v)
    torch.testing.assert_close(ours, plain(*(x.double() for x in (q * 100, k * 100, v)), [40]).float())
    mean = on("cpp", [40])(torch.zeros_like(q), k, v)[-1]
    torch.testing.assert_close(mean, v.mean(0).repeat_interleave(2, dim=0))


def test_a_bad_number_stays_in_its_sequence():
    q, k, v = streams([5, 6])
    v[2] = math.nan
    out = on("cpp", [5, 6])(q, k, v)
    assert out[4].isnan().all() and not out[5:].isnan().any()


def test_nothing_but_the_arguments_is_saved():
    leaves = [x.requires_grad_() for x in streams()]
    out = on("cpp", LENGTHS)(*leaves)
    assert [x.data_ptr() for x in out.grad_fn.saved_tensors] == [x.data_ptr() for x in leaves]


def test_auto_is_cpp_and_errors_name_the_argument():
    q, k, v = streams([5])
    with record_launches() as launches:
        packed_attention(q, k, v, [5])
    assert launches == [("packed_attention_forward", "cpp")]
    with pytest.raises(TypeError, match="k_KGD must have the dtype of q_TND"):
        packed_attention(q, k.double(), v, [5])
    with pytest.raises(ValueError, match="v_KGD must have the shape of k_KGD"):
        packed_attention(q, k, v[:, :1], [5])
    with pytest.raises(ValueError, match="the 3 heads of q_TND must be a multiple"):
        packed_attention(q[:, :3], k, v, [5])
    with pytest.raises(ValueError, match="lengths must sum to the rows of q_TND"):
        packed_attention(q, k, v, [4])
    with pytest.raises(ValueError, match="at least as many keys as queries"):
        packed_attention(q, k, v, [3, 2], key_lengths=[2, 3])
    with pytest.raises(ValueError, match="window"):
        packed_attention(q, k, v, [5], window=0)
    with pytest.raises(RuntimeError, match="packed_attention: double backward"):
        torch.autograd.grad(packed_attention(q.requires_grad_(), k, v, [5]).sum(), q, create_graph=True)
