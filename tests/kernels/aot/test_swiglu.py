"""Ahead-of-time compiles of swiglu, with a gate on spills."""

from icegrt.kernels.swiglu import triton as module
from tests.helpers.aot import EVERY_GENERATION, assert_nothing_spills


@EVERY_GENERATION
def test_swiglu(capability):
    types = dict.fromkeys(("gate_up_ptr", "out_ptr", "grad_ptr", "grad_gate_up_ptr"), "*bf16")
    for kernel in (module.swiglu_forward_kernel, module.swiglu_backward_kernel):
        used = {name: type_ for name, type_ in types.items() if name in kernel.arg_names}
        for aligned in (True, False):
            assert_nothing_spills(kernel, capability, {"BLOCK": module.BLOCK}, module.OPTIONS, aligned, **used)
