"""paged_attention on CPUs: against fp64, rows that depend on themselves alone, and invalid arguments."""

import pytest
import torch

from icegrt.kernels import available_backends, paged_attention, record_launches, use_backend
from tests.helpers.paged_cases import assert_attention_within_budget, draw, plain_attention

BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpp"])
# One token, a block and its neighbours, a split (256 tokens) and its neighbours, several splits.
LENGTHS = [1, 15, 16, 17, 255, 256, 257, 700]


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("window", [None, 1, 40, 300])
def test_decode(backend, dtype, window):
    assert_attention_within_budget(draw(LENGTHS, dtype=dtype), backend, window=window)


@BACKENDS
@pytest.mark.parametrize("window", [None, 9])
def test_chunks_beside_decodes(backend, window):
    """Whole prompts, a chunk behind cached tokens, and single rows in one call."""
    case = draw([1, 300, 40, 7, 290], [1, 1, 40, 7, 30], dtype=torch.bfloat16)
    assert_attention_within_budget(case, backend, window=window)


@BACKENDS
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 64), (9, 3, 64), (7, 1, 8), (12, 2, 100), (1, 1, 1)])
@pytest.mark.parametrize("block_size", [1, 16, 32])
def test_shapes_of_heads(backend, heads, groups, width, block_size):
    case = draw([33, 5], heads=heads, groups=groups, width=width, block_size=block_size)
    assert_attention_within_budget(case, backend)


@BACKENDS
def test_scale_peaks_and_equal_scores(backend):
    """A scale of one's own; scores of thousands; a scale of 0 is the mean of the values."""
    case = draw([270, 3])
    assert_attention_within_budget(case, backend, scale=0.37)
    assert_attention_within_budget(case, backend, slack=2e-3, scale=300.0)
    mean = torch.stack([v.mean(0).repeat_interleave(3, 0) for v in case.v])
    torch.testing.assert_close(case.attend(backend, scale=0.0), mean)


@BACKENDS
def test_padding_is_zero(backend):
    """A sequence of length 0, and the rows of a chunk before its first token."""
    case = draw([0, 5, 2], [1, 1, 4])
    out = case.attend(backend)
    assert torch.equal(out[[0, 2, 3]], torch.zeros(3, 6, 20)) and out[[1, 4, 5]].ne(0).all()
    torch.testing.assert_close(out, plain_attention(case, torch.float32))


@BACKENDS
def test_strided_views_and_out(backend):
    """Queries inside a fused projection, blocks inside a cache of several layers, tables by row, and static memory."""
    case = draw([19, 40, 3], width=8)
    expected = case.attend(backend)
    layers = torch.stack([torch.full_like(case.key_cache, torch.nan), case.key_cache, case.value_cache], 1)
    fused = torch.cat([case.q, case.q], 1)[:, :6]
    tables, rows = torch.full((9, 5), -1, dtype=torch.int32), torch.tensor([7, 2, 4], dtype=torch.int32)
    tables[rows.long(), : case.tables.shape[1]] = case.tables
    memory = torch.full((5, 6, 9), torch.nan)
    out = memory[1:4, :, :8]
    with use_backend(backend):
        result = paged_attention(
            fused, layers[:, 1], layers[:, 2], tables, case.lengths, table_rows_S=rows, max_length=40, out=out
        )
    assert result is out and torch.equal(out, expected)
    assert memory[[0, 4]].isnan().all() and memory[..., 8].isnan().all()


@BACKENDS
def test_rows_of_other_calls_stay(backend):
    """A step in two calls, decodes first, has the result of one."""
    case = draw([40, 300, 20, 31], [1, 1, 6, 9])
    whole, out = case.attend(backend), torch.full_like(case.q, torch.nan)
    caches = (case.key_cache, case.value_cache)
    with use_backend(backend):
        paged_attention(case.q[:2], *caches, case.tables, case.lengths[:2], out=out[:2])
        assert out[2:].isnan().all()
        paged_attention(case.q, *caches, case.tables[2:], case.lengths[2:], row_starts=case.row_starts[2:], out=out)
    torch.testing.assert_close(out, whole, rtol=1e-6, atol=1e-6)
    if backend == "cpp":
        assert torch.equal(out, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 270])
def test_bits_depend_on_the_row_alone(dtype, window):
    """Alone, in any order, in other blocks, of another size, at the end of a chunk: the same bits."""
    case = draw([5, 700, 256, 290, 31], dtype=dtype)
    whole = case.attend("cpp", window=window)
    for seed in range(3):
        order = torch.randperm(5, generator=torch.Generator().manual_seed(seed)).tolist()
        shuffled = case.only(*order, seed=seed + 7)
        assert not torch.equal(shuffled.tables[order.index(1)], case.tables[1])
        assert torch.equal(shuffled.attend("cpp", window=window), whole[order])
    for s in range(5):
        assert torch.equal(case.only(s).attend("cpp", window=window), whole[s : s + 1])
        assert torch.equal(case.only(s, block_size=32).attend("cpp", window=window), whole[s : s + 1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 3)
        assert torch.equal(case.attend("cpp", window=window), whole)
    finally:
        torch.set_num_threads(threads)


def test_chunks_have_the_bits_of_decodes():
    """A prompt in one chunk, in chunks, and token by token."""
    case = draw([300], [300], dtype=torch.bfloat16)
    whole = case.attend("cpp", window=33)
    for rows in (1, 7, 64):
        for end in (rows, 257, 300):
            part = case.only(0)
            part.q, part.row_counts = case.q[end - rows : end], [rows]
            part.lengths, part.row_starts = torch.tensor([end]).int(), torch.tensor([0, rows]).int()
            assert torch.equal(part.attend("cpp", window=33), whole[end - rows : end])


def test_a_nan_stays_in_its_sequence():
    case = draw([20, 20])
    clean = case.attend("cpp")
    case.key_cache[case.tables[0, 0], :, 3] = torch.nan
    out = case.attend("cpp")
    assert out[0].isnan().all() and torch.equal(out[1], clean[1])


def test_every_fp16_number_is_read_and_written():
    """Attention to one token is its value: all 65,536 numbers of fp16 go through the conversions."""
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16).view(-1, 1, 1, 64)
    tables = torch.arange(len(values), dtype=torch.int32)[:, None]
    ones = torch.ones(len(values), 1, 64, dtype=torch.float16)
    with use_backend("cpp"):
        out = paged_attention(ones, torch.zeros_like(values), values, tables, torch.ones_like(tables[:, 0]))
    assert torch.equal(out.flatten().nan_to_num(7.0), values.flatten().nan_to_num(7.0))
    assert torch.equal(out.isnan().flatten(), values.isnan().flatten())


def test_auto_is_cpp_and_no_rows_are_no_launch():
    assert available_backends("paged_attention") == ("triton", "cpp", "reference")
    case = draw([4])
    with record_launches() as launches:
        case.attend("auto")
        case.q, case.lengths = case.q[:0], case.lengths[:0]
        assert case.attend("auto").shape == (0, 6, 20)
    assert launches == [("paged_attention", "cpp")]


@BACKENDS
def test_errors_name_the_argument(backend):
    case = draw([20, 20])
    caches = [case.key_cache, case.value_cache]

    def error(kind, message, q=case.q, k=caches[0], v=caches[1], tables=case.tables, lengths=case.lengths, **keywords):
        with pytest.raises(kind, match=message), use_backend(backend):
            paged_attention(q, k, v, tables, lengths, **keywords)

    error(TypeError, "q_TND must be torch.float32 like the cache", q=case.q.bfloat16())
    error(TypeError, "lengths_S must be int32", lengths=case.lengths.long())
    error(ValueError, "heads of q_TND must be a multiple of the cache's 2", q=case.q[:, :5])
    error(ValueError, r"value_cache_BGKD must have shape", v=caches[1][:-1])
    error(
        ValueError,
        "each block of key_cache_BGKD must be contiguous",
        k=caches[0].transpose(1, 2).contiguous().transpose(1, 2),
    )
    error(ValueError, "block_tables must have a row for each of 2", tables=case.tables[:1])
    error(ValueError, "max_length must be finite and >= 0 and <= 32", max_length=33)
    error(ValueError, "window must be finite and >= 1", window=0)
    error(ValueError, "heads of out must be contiguous", out=torch.zeros(2, 20, 6).transpose(1, 2))
    error(ValueError, "there is no gradient", q=case.q.clone().requires_grad_())
    # What a device cannot check without waiting, a CPU does.
    error(ValueError, "lengths_S must be at most max_length 19", max_length=19)
    error(ValueError, "block_tables must name one of the", tables=torch.full_like(case.tables, 7000))
    error(ValueError, "block_tables must name one of the", tables=torch.full_like(case.tables, -1))
    error(ValueError, "row_starts must not decrease", row_starts=torch.tensor([0, 3, 2]).int())
