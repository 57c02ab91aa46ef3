"""token_logprobs in Triton: the cases under the interpreter, and a compile for each generation without spills."""

import importlib

import pytest
from kernel_cases import run_under_interpreter, stack_bytes

pytest.importorskip("triton")


def test_under_the_interpreter():
    run_under_interpreter("token_logprobs")


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("logits", ["bf16", "fp32"])
def test_compiles_without_spills(capability, direction, logits):
    module = importlib.import_module("icegrt.kernels.token_logprobs_triton")
    kernel = getattr(module, f"token_logprobs_{direction}")
    signature = dict.fromkeys(kernel.arg_names, "*fp32") | {
        "logits_ptr": f"*{logits}",
        "grad_ptr": f"*{logits}",
        "labels_ptr": "*i64",
        "row_stride": "i64",
        "column_stride": "i32",
        "columns": "i32",
        "start": "i32",
        "valid": "i32",
        "temperature": "fp32",
    }
    constants = {"IGNORED": -100, "SCALED": True, "ENTROPY": True, "BLOCK": module.FORWARD_BLOCK}
    assert stack_bytes(kernel, signature, constants, capability, module.OPTIONS) == 0
