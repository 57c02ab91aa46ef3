"""rope_write_kv in Triton under the interpreter: the bits of rope_qkv and write_kv in one launch."""

import pytest
import torch

from icegrt.kernels import record_launches, rope_write_kv, use_backend
from tests.helpers.kernel_cases import module_constants, virtual_rows
from tests.helpers.paged_cases import drawn_projection, in_two_calls, same_bits


def check_writes(rows=37, groups=2, queries=3, width=12, block_size=16, dtype=torch.float32):
    """Padding, and slots beyond the cache, are not written: memory around caches and queries stays as it is."""
    qkv, cos, sin, *memory, slots = drawn_projection(rows, groups, queries, width, block_size, dtype)
    capacity = (memory[0].shape[0] - 2) * block_size
    slots[::5], slots[1::5] = block_size - 1, capacity + block_size
    within = (slots >= block_size) & (slots < capacity + block_size)
    expected = in_two_calls("triton", qkv, cos, sin, *memory, torch.where(within, slots, -1))
    queries_and_more = torch.full((rows + 1, groups * queries, width), torch.nan, dtype=dtype)
    with use_backend("triton"), module_constants("rope_write_kv", TILE=64):  # several programs, the last one partial
        caches = (x[1:-1] for x in memory)
        q = rope_write_kv(qkv, cos, sin, *caches, slots - block_size, out=queries_and_more[:-1])
    assert same_bits([q, *memory], expected)
    assert queries_and_more[-1].isnan().all()


def check_views():
    """Groups inside a wider projection, blocks of a cache of several layers, queries to a part of a buffer."""
    qkv, cos, sin, keys, values, slots = drawn_projection(9, 2, 3, 8, 4, torch.float32)
    expected = in_two_calls("triton", qkv, cos, sin, keys, values, slots)
    wide = torch.zeros(9, 2, 7, 8)[:, :, 1:6].copy_(qkv)
    layers = torch.stack([keys, values, keys], 1)
    untouched = layers[:, 2].clone()
    memory = torch.full((9, 7, 8), torch.nan)
    with use_backend("triton"):
        out = rope_write_kv(wide, cos, sin, layers[:, 0], layers[:, 1], slots, out=memory[:, :6])
    assert same_bits([out, layers[:, 0], layers[:, 1], layers[:, 2]], [*expected, untouched])
    assert memory[:, 6].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_are_those_of_two_calls(dtype):
    check_writes(dtype=dtype)


@pytest.mark.parametrize(("rows", "groups", "queries", "width", "block_size"), [(1, 1, 1, 2, 1), (70, 1, 2, 64, 1)])
def test_one_row_and_blocks_of_one_token(rows, groups, queries, width, block_size):
    check_writes(rows, groups, queries, width, block_size)


def test_views():
    check_views()


def test_offsets_of_blocks_do_not_overflow():
    """The last block lies 2^31 elements behind the first."""
    qkv, cos, sin, _, values, _ = drawn_projection(1, 1, 1, 8, 4, torch.bfloat16)
    cache, slots = virtual_rows(4 * 8).unflatten(1, (1, 4, 8)), torch.tensor([9]).int()
    expected = in_two_calls("triton", qkv, cos, sin, torch.zeros_like(values), values, slots)
    with use_backend("triton"):
        rope_write_kv(qkv, cos, sin, cache, values, slots)
    assert same_bits([cache[2, :, 1]], [expected[1][2, :, 1]])


def test_one_launch():
    case = drawn_projection(9, 2, 3, 8, 4, torch.float32)
    with record_launches() as launches, use_backend("triton"):
        rope_write_kv(*case)
    assert launches == [("rope_write_kv", "triton")]
