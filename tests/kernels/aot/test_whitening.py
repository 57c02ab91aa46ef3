"""Ahead-of-time compiles of masked_moments and whiten, with a gate on spills."""

import pytest

from icegrt.kernels.whitening import triton as module
from tests.helpers.aot import EVERY_GENERATION, assert_nothing_spills


@EVERY_GENERATION
@pytest.mark.parametrize("x", ["bf16", "fp32"])
def test_masked_moments(capability, x):
    kernel, constants = module.masked_moments_kernel, {"BLOCK": module.BLOCK}
    types = {"x_ptr": f"*{x}", "mask_ptr": "*u8", "partial_ptr": "*fp64", "moments_ptr": "*fp64", "done_ptr": "*i32"}
    for aligned in (True, False):
        assert_nothing_spills(kernel, capability, constants, module.OPTIONS, aligned, **types)


@EVERY_GENERATION
@pytest.mark.parametrize("mode", ["shift", "keep", "gradient"])
def test_whiten(capability, mode):
    constants = {"MODE": mode, "BLOCK": module.BLOCK}
    types = dict.fromkeys(("count_ptr", "mean_ptr", "m2_ptr"), "*fp64") | {"eps": "fp32"}
    for aligned in (True, False):
        assert_nothing_spills(module.whiten_kernel, capability, constants, module.OPTIONS, aligned, **types)
