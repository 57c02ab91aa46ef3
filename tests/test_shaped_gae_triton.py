"""shaped_gae in Triton: the cases under the interpreter, and a compile for each generation without spills."""

import importlib

import pytest
from kernel_cases import run_under_interpreter, stack_bytes

pytest.importorskip("triton")


def test_under_the_interpreter():
    run_under_interpreter("shaped_gae")


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_compiles_without_spills(capability, estimator):
    module = importlib.import_module("icegrt.kernels.shaped_gae_triton")
    kernel = module.shaped_gae_kernel
    signature = dict.fromkeys(kernel.arg_names, "*fp32")
    signature |= {"cu_ptr": "*i32", "mask_ptr": "*u8", "kl_coef": "fp32", "gamma": "fp32", "decay": "fp32"}
    flags = dict.fromkeys((n for n in kernel.arg_names if n.startswith("HAS_")), True)
    constants = {**flags, "ESTIMATOR": estimator, "LIMIT": module.EXPONENT_LIMIT, "BLOCK": module.BLOCK}
    assert stack_bytes(kernel, signature, constants, capability, module.OPTIONS) == 0
