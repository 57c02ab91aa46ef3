"""paged_attention in Triton under the interpreter: against fp64, rows that depend on themselves alone, launches.

The interpreter truncates where a device rounds to bf16: half precision is an input here, compared loosely.
"""

import contextlib

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from icegrt.kernels import paged_attention, record_launches, use_backend
from tests.helpers.kernel_cases import module_constants, virtual_rows
from tests.helpers.paged_cases import assert_attention_within_budget, draw


def check_decode(lengths=(3, 33, 200), dtype=torch.float32, split=64, slack=1e-6, window=None, **shape):
    """Attend over several splits of `split` tokens, in two launches."""
    with module_constants("paged_attention", SPLIT=split):
        assert_attention_within_budget(draw(list(lengths), dtype=dtype, **shape), "triton", slack, window=window)


def check_chunks(lengths=(5, 90, 20, 70), rows=(1, 40, 20, 7), window=None, pairs=16, **shape):
    """Attend with chunks of prompts beside decodes, in tiles of few rows."""
    with module_constants("paged_attention", SPLIT=64, PAIRS_OF_CHUNKS=pairs):
        case = draw(list(lengths), list(rows), **shape)
        assert_attention_within_budget(case, "triton", window=window)


def check_padding():
    case = draw([0, 5, 130], heads=2)
    with module_constants("paged_attention", SPLIT=64):
        for max_length in (130, 136):
            out = case.attend("triton", max_length=max_length)
            assert torch.equal(out[0], torch.zeros(2, 20)) and out[1:].ne(0).all() and out.isfinite().all()
    chunk = draw([2, 5], [4, 1])
    assert torch.equal(chunk.attend("triton")[:2], torch.zeros(2, 6, 20))


def check_too_long(split=64):
    """A device cannot raise for a length above max_length: the result is NaN, not that of fewer tokens."""
    case = draw([10, 100])
    for rows in (None, case.row_starts):
        with module_constants("paged_attention", SPLIT=split):
            out = case.attend("triton", max_length=99, row_starts=rows)
        assert out[0].isfinite().all() and out[1].isnan().all()


def check_bits(split=64, **keywords):
    """Alone, in any order, in other blocks of another size, in one launch instead of two: the same bits."""
    case = draw([5, 190, 64, 31])
    with module_constants("paged_attention", SPLIT=split):
        whole = case.attend("triton", **keywords)
        order = [3, 1, 0, 2]
        assert torch.equal(case.only(*order).attend("triton", **keywords), whole[order])
        for s in range(4):
            assert torch.equal(case.only(s).attend("triton", **keywords), whole[s : s + 1])
        assert torch.equal(case.only(1, block_size=32).attend("triton", **keywords), whole[1:2])
        # The rows as chunks of one: one program takes all splits, in tiles of the same size here.
        alone = case.only(1)
        chunk = alone.attend("triton", row_starts=torch.tensor([0, 1]).int(), **keywords)
        assert torch.equal(chunk, whole[1:2])


@contextlib.contextmanager
def products_by_row():
    """Let the interpreter's products round once: numpy's differ in bits with the place of a row, a device's do not."""
    product = interpreter.InterpreterBuilder.create_dot

    def rounded_once(self, a, b, d, *options):
        out = a.data.astype(np.float64) @ b.data.astype(np.float64) + d.data
        return interpreter.TensorHandle(out.astype(np.float32), d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = rounded_once
    try:
        yield
    finally:
        interpreter.InterpreterBuilder.create_dot = product


def check_bits_of_chunks(window=33):
    """A prompt in one chunk, and in chunks of other rows: other tiles, and other first tokens."""
    case = draw([120], [120])
    with module_constants("paged_attention", SPLIT=64), products_by_row():
        whole = case.attend("triton", window=window)
        for rows, end in ((1, 120), (7, 64), (40, 101)):
            part = case.only(0)
            part.q, part.row_counts = case.q[end - rows : end], [rows]
            part.lengths, starts = torch.tensor([end]).int(), torch.tensor([0, rows]).int()
            assert torch.equal(part.attend("triton", window=window, row_starts=starts), whole[end - rows : end])


@pytest.mark.parametrize("window", [None, 1, 70])
def test_decode(window):
    check_decode(window=window)


def test_one_split_and_the_real_split():
    check_decode((1, 16, 50), split=256)
    check_decode((300, 257), split=256)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    check_decode(dtype=dtype, slack=2e-2)


@pytest.mark.parametrize(("heads", "groups", "width", "block_size"), [(4, 4, 64, 16), (9, 3, 8, 32), (17, 1, 4, 1)])
def test_shapes_of_heads(heads, groups, width, block_size):
    check_decode((33, 70), heads=heads, groups=groups, width=width, block_size=block_size)


@pytest.mark.parametrize("window", [None, 9, 80])
def test_chunks_beside_decodes(window):
    check_chunks(window=window)


def test_a_chunk_of_a_sequence_alone():
    check_chunks((100,), (33,))
    check_chunks((30, 0, 4), (30, 1, 4), heads=4, groups=4)


def test_padding_is_zero():
    check_padding()


def test_a_length_above_the_maximum_is_nan():
    check_too_long()


@pytest.mark.parametrize("window", [None, 90])
def test_bits_depend_on_the_row_alone(window):
    check_bits(window=window)


def test_bits_of_a_row_do_not_depend_on_its_chunk():
    check_bits_of_chunks()
    check_bits_of_chunks(window=None)


def test_views_and_static_memory():
    """Queries inside a fused projection, blocks inside a cache of layers, rows of the table by name."""
    case = draw([19, 40, 70], width=8)
    expected = case.attend("triton")
    fused = torch.cat([case.q, case.q], 1)[:, :6]
    layers = torch.stack([torch.full_like(case.key_cache, torch.nan), case.key_cache, case.value_cache], 1)
    tables, rows = torch.full((9, 8), -1, dtype=torch.int32), torch.tensor([7, 2, 4], dtype=torch.int32)
    tables[rows.long(), : case.tables.shape[1]] = case.tables
    memory = torch.full((3, 6, 9), torch.nan)
    case.q, case.key_cache, case.value_cache, case.tables = fused, layers[:, 1], layers[:, 2], tables
    case.attend("triton", table_rows_S=rows, max_length=70, out=memory[..., :8])
    assert torch.equal(memory[..., :8], expected) and memory[..., 8].isnan().all()


def test_offsets_of_blocks_do_not_overflow():
    """The last block lies 2^31 elements behind the first."""
    cache = virtual_rows(16 * 8).unflatten(1, (1, 16, 8))
    cache[2] = torch.randn(16, 8)
    q, table, length = torch.randn(1, 2, 8).bfloat16(), torch.tensor([[2]]).int(), torch.tensor([16]).int()
    with use_backend("triton"):
        out = paged_attention(q, cache, cache, table, length)
    with use_backend("reference"):
        torch.testing.assert_close(out, paged_attention(q, cache[2:], cache[2:], table - 2, length), rtol=0, atol=2e-2)


def test_launches():
    """Two launches for several splits, one otherwise; none depends on the lengths."""
    case = draw([5, 40, 9])
    with record_launches() as launches:
        case.attend("triton", max_length=48)
        case.attend("triton", row_starts=case.row_starts)
        with module_constants("paged_attention", SPLIT=16):
            case.attend("triton")
    assert launches == [("paged_attention", "triton")] * 3 + [("merge_splits", "triton")]
