"""write_kv and copy_blocks in Triton under the interpreter: the bits of the rows, and nothing else touched."""

import pytest
import torch

from icegrt.kernels import copy_blocks, record_launches, use_backend, write_kv
from tests.helpers.kernel_cases import module_constants, virtual_rows
from tests.helpers.paged_cases import drawn_caches, expected_copies, expected_writes, same_bits


def check_writes(rows=37, groups=3, width=12, block_size=16, dtype=torch.float32):
    """Padding, and slots beyond the cache, are not written: memory around the cache stays as it is."""
    k, v, *memory, slots = drawn_caches(rows, groups, width, block_size, dtype)
    capacity = (memory[0].shape[0] - 2) * block_size
    slots[::5], slots[1::5] = block_size - 1, capacity + block_size
    within = (slots >= block_size) & (slots < capacity + block_size)
    expected = expected_writes(k, v, *memory, torch.where(within, slots, -1))
    with use_backend("triton"), module_constants("write_kv", TILE=64):  # several programs, the last one partial
        write_kv(k, v, *(x[1:-1] for x in memory), slots - block_size)
    assert same_bits(memory, expected)


def check_views():
    k, v, keys, values, slots = drawn_caches(9, 2, 8, 4, torch.float32)
    expected = expected_writes(k, v, keys, values, slots)
    qkv = torch.stack([k, v], 2).flatten(1, 2)
    layers = torch.stack([keys, values, keys], 1)
    untouched = layers[:, 2].clone()
    with use_backend("triton"):
        write_kv(qkv[:, ::2], qkv[:, 1::2], layers[:, 0], layers[:, 1], slots)
    assert same_bits([layers[:, 0], layers[:, 1], layers[:, 2]], [*expected, untouched])


def check_copies(pairs=((0, 1), (1, 2), (4, 5), (5, 4), (3, 6), (3, 7), (-1, 8), (9, -1), (10, 12), (12, 11))):
    """A chain, a swap, two copies of one block, padding, and blocks beyond the cache."""
    memory = torch.randn(3, 14, 2, 4, 20)
    expected = expected_copies(memory, [(a + 1, b + 1) for a, b in pairs if max(a, b) < 12 and min(a, b) >= 0])
    source, target = torch.tensor(pairs, dtype=torch.int32).T
    with use_backend("triton"), module_constants("copy_blocks", TILE=64):
        copy_blocks(memory[:, 1:-1], source, target)
    assert same_bits([memory], [expected])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_are_written_to_their_slots(dtype):
    check_writes(dtype=dtype)


def test_one_row_and_tokens_of_their_own():
    check_writes(1, 1, 1, 1)
    check_writes(70, 2, 64, 1)


def test_views():
    check_views()


def test_sources_are_read_before_targets_are_written():
    check_copies()


def test_offsets_of_blocks_do_not_overflow():
    """The last block lies 2^31 elements behind the first."""
    cache = virtual_rows(4 * 8).unflatten(1, (1, 4, 8))
    k, v = torch.randn(2, 1, 1, 8).bfloat16()
    with use_backend("triton"):
        write_kv(k, v, cache, torch.zeros(3, 1, 4, 8).bfloat16(), torch.tensor([9]).int())
        assert same_bits([cache[2, :, 1]], [k[0]])
        copy_blocks(cache[None], torch.tensor([2]).int(), torch.tensor([1]).int())
    assert same_bits([cache[1]], [cache[2]])


def test_one_launch_a_call():
    k, v, keys, values, slots = drawn_caches(9, 2, 8, 4, torch.float32)
    with record_launches() as launches, use_backend("triton"):
        write_kv(k, v, keys, values, slots)
        copy_blocks(torch.stack([keys, values]), slots[:3] // 4, slots[3:6] // 4 * 0 - 1)
    assert launches == [("write_kv", "triton"), ("copy_blocks", "triton")]
