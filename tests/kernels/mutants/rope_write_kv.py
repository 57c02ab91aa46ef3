"""Mutants of rope_write_kv."""

from tests.kernels.mutants.mutation import Mutant
from tests.kernels.triton.test_rope_write_kv import check_views, check_writes

MODULE = "rope_write_kv.triton"
KERNEL = "rope_write_kv_kernel"

MUTANTS = (
    Mutant(
        MODULE,
        KERNEL,
        "padding is written before the cache",
        "written = (slot >= 0) & (slot < capacity) & inside\nslot = tl.where((slot >= 0) & (slot < capacity), slot, 0)",
        "written = (slot < capacity) & inside\nslot = tl.where(slot < capacity, slot, 0)",
        check_writes,
    ),
    Mutant(
        MODULE,
        KERNEL,
        "keys and values of padding are written to the first slot",
        "written = (slot >= 0) & (slot < capacity) & inside",
        "written = inside",
        check_writes,
    ),
    Mutant(
        MODULE,
        KERNEL,
        "heads of a block overlap",
        "group * block_size + slot % block_size",
        "group + slot % block_size",
        check_writes,
    ),
    Mutant(
        MODULE,
        KERNEL,
        "values are rotated",
        "head == queries + 1",
        "head > queries + 1",
        check_writes,
    ),
    Mutant(
        MODULE,
        KERNEL,
        "queries of padding are not rotated",
        "rotate(source, to, cos, sin, inside, half)",
        "rotate(source, to, cos, sin, written, half)",
        check_writes,
    ),
    Mutant(
        MODULE,
        KERNEL,
        "blocks of keys are thought neighbours",
        "block * key_stride_b",
        "block * ((tl.num_programs(1) // (queries + 2)) * block_size * 2 * half)",
        check_views,
    ),
    Mutant(
        MODULE,
        KERNEL,
        "groups of a projection are thought neighbours",
        "group * stride_g",
        "group * (queries + 2) * stride_m",
        check_views,
    ),
    Mutant(
        MODULE,
        KERNEL,
        "the second half of a value is the first",
        "tl.load(source + half, mask=written)",
        "tl.load(source, mask=written)",
        check_writes,
    ),
)
