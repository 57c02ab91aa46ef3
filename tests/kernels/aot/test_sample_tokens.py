"""Ahead-of-time compiles of sample_tokens, with a gate on spills."""

import pytest

from icegrt.kernels.sample_tokens import triton as module
from tests.helpers.aot import EVERY_GENERATION, assert_nothing_spills


@EVERY_GENERATION
@pytest.mark.parametrize("settings", ["untruncated", "numbers", "small numbers", "by row"])
@pytest.mark.parametrize("logits", ["bf16", "fp16", "fp32"])
def test_sample_tokens(capability, settings, logits):
    """Settings as numbers, of which a share below 2.4e-7 arrives as int32, or by row with allowed ids."""
    by_row = settings == "by row"
    constants = {name: by_row for name in module.sample_tokens_kernel.arg_names if name.endswith("_BY_ROW")}
    constants |= {"TRUNCATE": settings != "untruncated", "ALLOWED": by_row, "BLOCK": module.BLOCK}
    share = "i32" if settings == "small numbers" else "i64"
    types = dict.fromkeys(("ids_ptr", "positions_ptr", "token_ptr"), "*i64") | {"logits_ptr": f"*{logits}"}
    types |= (
        {"perturbed_ptr": "*fp64"}
        | dict.fromkeys(("row_stride", "allowed_stride", "seed"), "i64")
        | {"temperature": "fp32", "top_p": share, "min_p": share, "allowed_ptr": "*i32"}
    )
    if by_row:
        types |= {"seed": "*i64", "temperature": "*fp32", "top_k": "*i32", "top_p": "*fp32", "min_p": "*fp32"}
    # The kernel does not specialise on alignment.
    assert_nothing_spills(module.sample_tokens_kernel, capability, constants, module.OPTIONS, aligned=False, **types)
