"""Ahead-of-time compiles of the writes to a paged KV cache, with a gate on spills."""

import pytest
import triton

from icegrt.kernels.paged_kv import triton as module
from tests.helpers.aot import EVERY_GENERATION, assert_nothing_spills


@EVERY_GENERATION
@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
def test_write_kv(capability, dtype):
    kernel = module.write_kv_kernel
    types = {name: dtype for name in kernel.arg_names if name.endswith("_ptr")} | {"slots_ptr": "*i32"}
    types |= {"key_stride_b": "i64", "value_stride_b": "i64"}
    for width in (64, 100, 256):
        block = triton.next_power_of_2(width)
        constants = {"ROWS": module.TILE // block, "BLOCK": block}
        for aligned in (True, False):
            assert_nothing_spills(kernel, capability, constants, module.OPTIONS, aligned, **types)


@EVERY_GENERATION
@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
def test_copy_blocks(capability, dtype):
    kernel = module.copy_blocks_kernel
    types = {"cache_ptr": dtype, "staging_ptr": dtype, "from_ptr": "*i32", "to_ptr": "*i32"}
    types |= {"cache_stride_p": "i64", "cache_stride_b": "i64"}
    for aligned in (True, False):
        assert_nothing_spills(kernel, capability, {"BLOCK": module.TILE}, module.OPTIONS, aligned, **types)
