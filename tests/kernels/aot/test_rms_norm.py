"""Ahead-of-time compiles of the norms, with a gate on spills."""

import pytest

from icegrt.kernels.rms_norm import triton as module
from tests.helpers.aot import EVERY_GENERATION, assert_nothing_spills

HALF = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "eps": "fp32", "outer_stride": "i64", "inner_stride": "i64"}
HALF |= {"out_outer_stride": "i64", "out_inner_stride": "i64"}


@EVERY_GENERATION
@pytest.mark.parametrize("width", [64, 3584, 8192, 16384])
@pytest.mark.parametrize("add", [True, False])
def test_rms_norm(capability, width, add):
    """Heads, and the hidden sizes of models of 7, 70 and 405 billion parameters."""
    constants, options = module.tile(width)
    constants |= {"ADD": add}
    types = HALF | {"residual_ptr": "*bf16", "out_ptr": "*bf16", "sum_ptr": "*bf16"}
    for aligned in (True, False):
        # Heads of a projection may be normed in place; hidden states have contiguous buffers.
        for strided in {False, width == 64}:
            forward = constants | {"SAVE": aligned and not strided, "STRIDED": strided}
            assert_nothing_spills(module.rms_norm_forward_kernel, capability, forward, options, aligned, **types)
    types = HALF | {"grad_ptr": "*bf16", "grad_sum_ptr": "*bf16", "grad_x_ptr": "*bf16"}
    for weighted in (True, False):
        constants |= {"WEIGHTED": weighted}
        assert_nothing_spills(module.rms_norm_backward_kernel, capability, constants, options, True, **types)
