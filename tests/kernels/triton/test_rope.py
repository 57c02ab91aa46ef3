"""rope and rope_qkv in Triton under the interpreter: against fp64, views, and one launch for all heads.

The interpreter truncates where a device rounds to bf16: half precision is an input here, compared loosely.
"""

import pytest
import torch

from icegrt.kernels import record_launches, rope, rope_qkv
from tests.helpers.kernel_cases import module_constants
from tests.helpers.trunk_cases import assert_same_bits, assert_trunk_within_budget, fused_call, inputs, results


def check_rope(op=rope, rows=21, width=12, dtype=torch.float32):
    slack = 1e-6 if dtype == torch.float32 else 2e-2
    with module_constants(op.__name__, TILE=64):  # several programs of tokens, the last one partial
        assert_trunk_within_budget(op, "triton", inputs(op, rows, width, dtype), slack)


@pytest.mark.parametrize("op", [rope, rope_qkv])
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 2), (33, 100)])
def test_formula_and_gradients(op, rows, width):
    check_rope(op, rows, width)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", [rope, rope_qkv])
def test_half_precision(op, dtype):
    check_rope(op, dtype=dtype)


def test_views_are_read_in_place():
    *heads, cos, sin = inputs(rope, 11, 8)
    views = [torch.cat([x, x], 1)[:, ::2][:, : x.shape[1]] for x in heads]
    copies = results(fused_call(rope, "triton"), [*(x.contiguous() for x in views), cos, sin])
    assert_same_bits(results(fused_call(rope, "triton"), [*views, cos, sin]), copies)


def test_one_launch_a_pass():
    with record_launches() as launches:
        results(fused_call(rope_qkv, "triton"), inputs(rope_qkv, 9, 8))
    assert launches == [("rope", "triton")] * 2
