"""Ahead-of-time compiles of rope_write_kv, with a gate on spills."""

import pytest
import triton

from icegrt.kernels.rope_write_kv import triton as module
from tests.helpers.aot import EVERY_GENERATION, assert_nothing_spills


@EVERY_GENERATION
@pytest.mark.parametrize("half", [16, 40, 64, 128])
@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
def test_rope_write_kv(capability, half, dtype):
    kernel = module.rope_write_kv_kernel
    block = triton.next_power_of_2(half)
    constants = {"TOKENS": module.TILE // block, "HALF_BLOCK": block}
    types = dict.fromkeys(("qkv_ptr", "out_ptr", "key_cache_ptr", "value_cache_ptr"), dtype) | {"slots_ptr": "*i32"}
    types |= dict.fromkeys(("stride_t", "key_stride_b", "value_stride_b"), "i64")
    for aligned in (True, False):
        assert_nothing_spills(kernel, capability, constants, module.OPTIONS, aligned, **types)
