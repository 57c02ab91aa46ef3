"""Mutants of write_kv and copy_blocks."""

from tests.kernels.mutants.mutation import Mutant
from tests.kernels.triton.test_paged_kv import check_copies, check_views, check_writes

MODULE = "paged_kv.triton"

MUTANTS = (
    Mutant(
        MODULE,
        "write_kv_kernel",
        "padding is written before the cache",
        "(slot >= 0) & (slot < capacity)",
        "(slot >= -1) & (slot < capacity)",
        check_writes,
    ),
    Mutant(
        MODULE,
        "write_kv_kernel",
        "a slot beyond the cache is written",
        "(slot >= 0) & (slot < capacity)",
        "(slot >= 0) & (slot < capacity + block_size)",
        check_writes,
    ),
    Mutant(
        MODULE,
        "write_kv_kernel",
        "values take the stride of keys",
        "row * v_stride_t",
        "row * k_stride_t // 2",
        check_views,
    ),
    Mutant(
        MODULE,
        "write_kv_kernel",
        "heads overlap",
        "group * block_size + slot % block_size",
        "group + slot % block_size",
        check_writes,
    ),
    Mutant(
        MODULE,
        "write_kv_kernel",
        "programs of values write keys",
        "tl.program_id(1) < groups",
        "tl.program_id(1) <= groups",
        check_writes,
    ),
    Mutant(
        MODULE,
        "write_kv_kernel",
        "blocks of a view are thought neighbours",
        "slot // block_size * value_stride_b",
        "slot // block_size * (groups * block_size * width)",
        check_views,
    ),
    Mutant(
        MODULE,
        "copy_blocks_kernel",
        "a target is written before it is read as a source",
        "tl.store(staging + tl.cast(copy, tl.int64) * size, x, mask=copied)",
        "tl.store(staging + tl.cast(copy, tl.int64) * size, x, mask=copied)\n"
        "tl.store(cache + target * cache_stride_b, x, mask=copied)",
        check_copies,
    ),
    Mutant(
        MODULE,
        "copy_blocks_kernel",
        "all parts are those of the first",
        "tl.program_id(1).to(tl.int64) * cache_stride_p",
        "tl.program_id(1).to(tl.int64) * 0",
        check_copies,
    ),
    Mutant(
        MODULE,
        "copied_size",
        "padding is copied from a block before the cache",
        "source >= 0",
        "source >= -1",
        check_copies,
        kernel="copy_blocks_kernel",
    ),
    Mutant(
        MODULE,
        "copied_size",
        "a block beyond the cache is a target",
        "target < blocks",
        "target < blocks + 1",
        check_copies,
        kernel="copy_blocks_kernel",
    ),
)
