"""Ahead-of-time compiles with a gate on spills (run by test_kernels_compile.py)."""

import importlib

import pytest
from kernel_cases import stack_bytes

GENERATIONS = pytest.mark.parametrize("capability", [80, 90, 100])


@GENERATIONS
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("logits", ["bf16", "fp32"])
def test_token_logprobs(capability, direction, logits):
    module = importlib.import_module("icegrt.kernels.token_logprobs_triton")
    kernel = getattr(module, f"token_logprobs_{direction}")
    signature = dict.fromkeys(kernel.arg_names, "*fp32") | {
        "logits_ptr": f"*{logits}",
        "grad_ptr": f"*{logits}",
        "labels_ptr": "*i64",
        "live_ptr": "*i64",
        "row_stride": "i64",
        "column_stride": "i32",
        "grad_row_stride": "i64",
        "grad_column_stride": "i32",
        "columns": "i32",
        "start": "i32",
        "valid": "i32",
        "temperature": "fp32",
    }
    constants = {"IGNORED": -100, "SCALED": True, "ENTROPY": True, "BLOCK": module.FORWARD_BLOCK}
    constants |= {"COMPACT": True} if direction == "backward" else {}
    assert stack_bytes(kernel, signature, constants, capability, module.OPTIONS) == 0
