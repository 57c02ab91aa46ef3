"""write_kv and copy_blocks on CPUs: the bits of the rows, nothing else touched, and invalid arguments."""

import pytest
import torch

from icegrt.kernels import copy_blocks, record_launches, use_backend, write_kv
from tests.helpers.paged_cases import drawn_caches, expected_copies, expected_writes, same_bits

BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpp"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


@BACKENDS
@DTYPES
@pytest.mark.parametrize(("rows", "groups", "width", "block_size"), [(1, 1, 1, 1), (37, 3, 64, 16), (400, 2, 20, 32)])
def test_rows_are_written_to_their_slots(backend, dtype, rows, groups, width, block_size):
    k, v, keys, values, slots = drawn_caches(rows, groups, width, block_size, dtype)
    slots[::5] = -1  # padding
    expected = expected_writes(k, v, keys, values, slots)
    with use_backend(backend):
        assert write_kv(k, v, keys, values, slots) is None
    assert same_bits([keys, values], expected)


@BACKENDS
def test_views(backend):
    """Keys and values inside a fused projection, and blocks inside a cache of several layers."""
    k, v, keys, values, slots = drawn_caches(9, 2, 8, 4, torch.float32)
    expected = expected_writes(k, v, keys, values, slots)
    qkv = torch.stack([k, v], 2).flatten(1, 2)
    layers = torch.stack([keys, values, keys], 1)
    untouched = layers[:, 2].clone()
    with use_backend(backend):
        write_kv(qkv[:, ::2], qkv[:, 1::2], layers[:, 0], layers[:, 1], slots)
    assert same_bits([layers[:, 0], layers[:, 1], layers[:, 2]], [*expected, untouched])
    turned = k.transpose(1, 2).contiguous().transpose(1, 2)
    with use_backend(backend):
        write_kv(turned, v, keys, values, slots)
    assert same_bits([keys, values], expected)


@BACKENDS
@DTYPES
def test_sources_are_read_before_targets_are_written(backend, dtype):
    """A chain, a swap, several copies of one block, padding: each target has what its source had before."""
    cache = torch.randn(4, 12, 2, 16, 20).to(dtype)
    for pairs in ([(0, 1)], [(0, 1), (1, 2), (2, 3)], [(4, 5), (5, 4)], [(3, 6), (3, 7), (-1, 2), (1, -1), (8, 8)]):
        source, target = torch.tensor(pairs, dtype=torch.int32).T
        expected = expected_copies(cache, pairs)
        with use_backend(backend):
            assert copy_blocks(cache, source, target) is None
        assert same_bits([cache], [expected])


@BACKENDS
def test_copies_within_a_view(backend):
    """Blocks that lie apart: the parts of other blocks stay."""
    memory = torch.randn(3, 5, 2, 2, 4, 8)
    cache, rest = memory[:, :, 0], memory[:, :, 1].clone()
    expected = expected_copies(cache, [(4, 0), (0, 3)])
    with use_backend(backend):
        copy_blocks(cache, torch.tensor([4, 0]).int(), torch.tensor([0, 3]).int())
    assert same_bits([cache, memory[:, :, 1]], [expected, rest])


def test_auto_is_cpp_and_nothing_to_do_is_no_launch():
    k, v, keys, values, slots = drawn_caches(3, 1, 4, 2, torch.float32)
    cache, none = torch.zeros(2, 3, 4), torch.zeros(0, dtype=torch.int32)
    with record_launches() as launches:
        write_kv(k, v, keys, values, slots)
        copy_blocks(cache, torch.tensor([1]).int(), torch.tensor([0]).int())
        write_kv(k[:0], v[:0], keys, values, slots[:0])
        copy_blocks(cache, none, none)
    assert launches == [("write_kv", "cpp"), ("copy_blocks", "cpp")]


@BACKENDS
def test_errors_name_the_argument(backend):
    k, v, keys, values, slots = drawn_caches(4, 2, 8, 4, torch.float32)
    cache, one = torch.zeros(2, 3, 4), torch.tensor([1]).int()
    before = [x.clone() for x in (keys, values)]
    for kind, message, call in (
        (TypeError, "k_TGD must be torch.float32 like the cache", lambda: write_kv(k.half(), v, keys, values, slots)),
        (TypeError, "cache_slots_T must be int32", lambda: write_kv(k, v, keys, values, slots.long())),
        (ValueError, "k_TGD must have shape", lambda: write_kv(k[..., :4], v, keys, values, slots)),
        (ValueError, "v_TGD must have shape", lambda: write_kv(k, v[:2], keys, values, slots)),
        (ValueError, "each block of value_cache", lambda: write_kv(k, v, keys, values.mT.contiguous().mT, slots)),
        (
            ValueError,
            "must not require a gradient",
            lambda: write_kv(k, v, keys.clone().requires_grad_(), values, slots),
        ),
        (ValueError, "cache_slots_T must be below", lambda: write_kv(k, v, keys, values, slots + 1000)),
        (ValueError, "cache_PB must have parts", lambda: copy_blocks(cache[0], one, one)),
        (ValueError, "each block of cache_PB", lambda: copy_blocks(torch.zeros(2, 3, 8)[..., ::2], one, one)),
        (ValueError, "copies must be between the 3 blocks", lambda: copy_blocks(cache, one + 2, one)),
        (ValueError, "copy_to_C must have shape", lambda: copy_blocks(cache, one, one.repeat(2))),
    ):
        with pytest.raises(kind, match=message), use_backend(backend):
            call()
    assert same_bits([keys, values], before)
