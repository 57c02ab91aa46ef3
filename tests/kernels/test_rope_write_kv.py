"""rope_write_kv on CPUs: the bits of rope_qkv and write_kv, nothing else touched, and invalid arguments."""

import pytest
import torch

from icegrt.kernels import record_launches, rope_write_kv, use_backend
from tests.helpers.dispatch_records import Recorded
from tests.helpers.kernel_cases import assert_within_budget
from tests.helpers.paged_cases import drawn_projection, in_two_calls, same_bits
from tests.helpers.trunk_cases import plain_rope_qkv

BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpp"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
SHAPES = [(1, 1, 1, 2, 1), (37, 3, 4, 64, 16), (300, 2, 1, 20, 32)]


@BACKENDS
@DTYPES
@pytest.mark.parametrize(("rows", "groups", "queries", "width", "block_size"), SHAPES)
def test_bits_are_those_of_two_calls(backend, dtype, rows, groups, queries, width, block_size):
    *projection, keys, values, slots = drawn_projection(rows, groups, queries, width, block_size, dtype)
    slots[1::5] = -1  # padding: its queries are rotated, its key and value are not written
    expected = in_two_calls(backend, *projection, keys, values, slots)
    with use_backend(backend):
        q = rope_write_kv(*projection, keys, values, slots)
    assert same_bits([q, keys, values], expected)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_formula(backend, dtype):
    qkv, cos, sin, keys, values, slots = drawn_projection(23, 2, 3, 24, 4, dtype)
    with use_backend(backend):
        q = rope_write_kv(qkv, cos, sin, keys, values, slots)
    written = [cache[slots.long() // 4, :, slots.long() % 4] for cache in (keys, values)]
    plain, truth = plain_rope_qkv(qkv, cos, sin), plain_rope_qkv(qkv.double(), cos.double(), sin.double())
    for ours, same_dtype, exact in zip((q, *written), plain, truth, strict=True):
        assert_within_budget(ours, same_dtype, exact, 1e-6)


@BACKENDS
def test_views_and_buffers(backend):
    """Heads inside a wider projection, blocks of a cache of several layers, queries to a part of a buffer."""
    qkv, cos, sin, keys, values, slots = drawn_projection(9, 2, 3, 8, 4, torch.float32)
    expected = in_two_calls(backend, qkv, cos, sin, keys, values, slots)
    wide = torch.cat([qkv, qkv], 1)[:, ::2][:, :2].contiguous().repeat(1, 1, 2, 1)[:, :, :5]
    wide.copy_(qkv)
    layers = torch.stack([keys, values, keys], 1)
    untouched = layers[:, 2].clone()
    memory = torch.full((12, 7, 8), torch.nan)
    with use_backend(backend):
        out = rope_write_kv(wide, cos, sin, layers[:, 0], layers[:, 1], slots, out=memory[1:10, :6])
    assert not wide.is_contiguous() and out.data_ptr() == memory[1].data_ptr()
    assert same_bits([out, layers[:, 0], layers[:, 1], layers[:, 2]], [*expected, untouched])
    assert memory[:, 6].isnan().all() and memory[[0, 10, 11]].isnan().all()
    turned = qkv.transpose(2, 3).contiguous().transpose(2, 3)
    with use_backend(backend):
        q = rope_write_kv(turned, cos, sin, keys, values, slots)
    assert same_bits([q, keys, values], expected)


def test_threads_do_not_change_bits():
    case = drawn_projection(2000, 4, 3, 64, 16, torch.bfloat16)
    expected = in_two_calls("cpp", *case)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 3)
        assert same_bits([rope_write_kv(*case), *case[3:5]], expected)
    finally:
        torch.set_num_threads(threads)


def test_auto_is_cpp_in_one_launch_without_an_allocation():
    case = drawn_projection(5, 2, 3, 8, 4, torch.bfloat16)
    out = torch.empty(5, 6, 8, dtype=torch.bfloat16)
    with record_launches() as launches, Recorded() as recorded:
        assert rope_write_kv(*case, out=out) is out
        rope_write_kv(case[0][:0], *(x[:0] for x in case[1:3]), *case[3:5], case[5][:0], out=out[:0])
    assert launches == [("rope_write_kv", "cpp")]
    assert not [name for name in recorded.names if name not in VIEWS], recorded.names


VIEWS = {"aten::slice", "aten::split_with_sizes", "aten::view", "aten::detach"}


@BACKENDS
def test_errors_name_the_argument(backend):
    qkv, cos, sin, keys, values, slots = drawn_projection(4, 2, 3, 8, 4, torch.float32)
    before, out = [x.clone() for x in (keys, values)], torch.zeros(4, 6, 8)
    caches = (keys, values, slots)
    for kind, message, call in (
        (
            TypeError,
            "qkv_TGMD must be torch.float32 like the cache",
            lambda: rope_write_kv(qkv.half(), cos, sin, *caches),
        ),
        (TypeError, "must be int32", lambda: rope_write_kv(qkv, cos, sin, keys, values, slots.long())),
        (ValueError, "must have 2 groups of heads of 8", lambda: rope_write_kv(qkv[:, :1], cos, sin, *caches)),
        (ValueError, "must have 3 or more heads", lambda: rope_write_kv(qkv[:, :, :2], cos, sin, *caches)),
        (ValueError, "cos_TR must have shape", lambda: rope_write_kv(qkv, cos[:3], sin, *caches)),
        (ValueError, "cache_slots_T must have shape", lambda: rope_write_kv(qkv, cos, sin, keys, values, slots[:2])),
        (ValueError, "cache_slots_T must be below", lambda: rope_write_kv(qkv, cos, sin, keys, values, slots + 99)),
        (ValueError, "there is no gradient", lambda: rope_write_kv(qkv.clone().requires_grad_(), cos, sin, *caches)),
        (
            ValueError,
            "value_cache_BGKD must not require",
            lambda: rope_write_kv(qkv, cos, sin, keys, values.clone().requires_grad_(), slots),
        ),
        (ValueError, "out must have shape", lambda: rope_write_kv(qkv, cos, sin, *caches, out=out[:3])),
        (TypeError, "out must be torch.float32", lambda: rope_write_kv(qkv, cos, sin, *caches, out=out.double())),
        (
            ValueError,
            "heads of out must be contiguous",
            lambda: rope_write_kv(qkv, cos, sin, *caches, out=torch.zeros(4, 6, 16)[..., ::2]),
        ),
        (
            ValueError,
            "out must not overlap with qkv_TGMD",
            lambda: rope_write_kv(qkv, cos, sin, *caches, out=qkv.view(4, 10, 8)[:, :6]),
        ),
    ):
        with pytest.raises(kind, match=message), use_backend(backend):
            call()
    assert same_bits([keys, values, out], [*before, torch.zeros(4, 6, 8)])
