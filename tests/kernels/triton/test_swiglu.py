"""swiglu in Triton under the interpreter: against fp64, over several programs a row, and for extreme gates.

The interpreter truncates where a device rounds to bf16: half precision is an input here, compared loosely.
"""

import pytest
import torch

from icegrt.kernels import record_launches, swiglu, use_backend
from tests.helpers.trunk_cases import assert_trunk_within_budget, fused_call, inputs, results


def check_swiglu(rows=3, width=1030, dtype=torch.float32):
    slack = 1e-6 if dtype == torch.float32 else 2e-2
    assert_trunk_within_budget(swiglu, "triton", inputs(swiglu, rows, width, dtype), slack)


@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (5, 7), (3, 1030)])
def test_formula_and_gradients(rows, width):
    check_swiglu(rows, width)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    check_swiglu(dtype=dtype)


def test_gates_of_every_size():
    gate_up = torch.stack([torch.linspace(-200, 200, 801), torch.ones(801)], dim=1)
    with use_backend("triton"):
        out = swiglu(gate_up)
    truth = gate_up.double()
    torch.testing.assert_close(out[:, 0].double(), truth[:, 0] * truth[:, 0].sigmoid(), rtol=1e-6, atol=1e-30)


def test_a_buffer_has_the_bits_of_the_allocating_call():
    (gate_up,) = inputs(swiglu, 7, 30)
    out = torch.full((7, 1, 30), torch.nan)
    assert fused_call(swiglu, "triton")(gate_up, out=out) is out
    assert torch.equal(out, fused_call(swiglu, "triton")(gate_up))


def test_one_launch_a_pass():
    with record_launches() as launches:
        results(fused_call(swiglu, "triton"), inputs(swiglu, 2, 8))
    assert launches == [("swiglu_forward", "triton"), ("swiglu_backward", "triton")]
