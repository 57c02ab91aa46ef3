"""Ahead-of-time compiles of sample_tokens, with a gate on spills."""

import pytest

from icegrt.kernels.sample_tokens import triton as module
from tests.helpers.aot import EVERY_GENERATION, assert_nothing_spills


@EVERY_GENERATION
@pytest.mark.parametrize(("truncate", "top_p"), [(False, "i64"), (True, "i64"), (True, "i32")])
@pytest.mark.parametrize("logits", ["bf16", "fp16", "fp32"])
def test_sample_tokens(capability, truncate, top_p, logits):
    """A top_p below 2.4e-7 arrives as int32."""
    constants = {"TRUNCATE": truncate, "BLOCK": module.BLOCK}
    types = dict.fromkeys(("ids_ptr", "positions_ptr", "token_ptr"), "*i64") | {"logits_ptr": f"*{logits}"}
    types |= (
        {"perturbed_ptr": "*fp64"}
        | dict.fromkeys(("row_stride", "seed"), "i64")
        | {"temperature": "fp32", "top_p": top_p}
    )
    # The kernel does not specialise on alignment.
    assert_nothing_spills(module.sample_tokens_kernel, capability, constants, module.OPTIONS, aligned=False, **types)
