"""Ahead-of-time compiles of rope, with a gate on spills."""

import pytest
import triton

from icegrt.kernels.rope import triton as module
from tests.helpers.aot import EVERY_GENERATION, assert_nothing_spills


@EVERY_GENERATION
@pytest.mark.parametrize("half", [16, 40, 64, 128])
@pytest.mark.parametrize("inverse", [True, False])
def test_rope(capability, half, inverse):
    block = triton.next_power_of_2(half)
    constants = {"INVERSE": inverse, "TOKENS": module.TILE // block, "HALF_BLOCK": block}
    heads = [name for name in module.rope_kernel.arg_names if name.endswith("_ptr") and name[0] in "qkv"]
    types = dict.fromkeys(heads, "*bf16")
    types |= {name: "i64" for name in module.rope_kernel.arg_names if name.endswith("_stride_t")}
    for aligned in (True, False):
        assert_nothing_spills(module.rope_kernel, capability, constants, module.OPTIONS, aligned, **types)
