"""rms_norm and add_rms_norm in Triton under the interpreter: against fp64, over many programs, views, and bits.

The interpreter truncates where a device rounds to bf16: half precision is an input here, compared loosely.
"""

import pytest
import torch

from icegrt.kernels import add_rms_norm, record_launches, rms_norm, use_backend
from tests.helpers.kernel_cases import module_constants
from tests.helpers.trunk_cases import assert_same_bits, assert_trunk_within_budget, fused_call, inputs, results


def check_norm(op=rms_norm, rows=37, width=40, dtype=torch.float32):
    slack = 1e-6 if dtype == torch.float32 else 2e-2
    assert_trunk_within_budget(op, "triton", inputs(op, rows, width, dtype), slack)


@pytest.mark.parametrize("op", [rms_norm, add_rms_norm])
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (3, 7), (130, 32), (5, 2100)])
def test_formula_and_gradients(op, rows, width):
    check_norm(op, rows, width)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", [rms_norm, add_rms_norm])
def test_half_precision(op, dtype):
    check_norm(op, dtype=dtype)


def check_few_programs():
    """More tiles than programs: each program of the backward walks several, and their parts add up."""
    with module_constants("rms_norm", PROGRAMS=3):
        check_norm(rows=700, width=32)


def test_few_programs():
    check_few_programs()


def check_long_rows():
    """Rows of several chunks, the last one partial, and more tiles than programs."""
    for op in (rms_norm, add_rms_norm):
        with module_constants(op.__name__, PROGRAMS=2, LONGEST_BLOCK=16):
            check_norm(op, rows=300, width=43)


def test_long_rows():
    check_long_rows()


def check_views():
    """Heads of a fused projection, read in place, forward and backward."""
    qkv, weight = torch.randn(9, 1, 3, 4, 16), torch.rand(16)
    for view in (qkv[..., :2, :], qkv[..., 3, :]):
        copy = results(fused_call(rms_norm, "triton"), [view.contiguous(), weight])
        assert_same_bits(results(fused_call(rms_norm, "triton"), [view, weight]), copy)


def test_views():
    check_views()


def check_buffers():
    """Heads normed in place, with short and long rows, and a residual stream: the bits of the allocating call."""
    qkv, weight, residual = torch.randn(9, 1, 3, 4, 43), torch.rand(43), torch.randn(9, 1, 43)
    norm, add = fused_call(rms_norm, "triton"), fused_call(add_rms_norm, "triton")
    for block in (4096, 16):
        with module_constants("rms_norm", LONGEST_BLOCK=block):
            memory, stream = qkv.clone(), residual.clone()
            heads, expected = memory[..., :2, :], norm(qkv[..., :2, :], weight)
            assert_same_bits([norm(heads, weight, out=heads), memory[..., 2:, :]], [expected, qkv[..., 2:, :]])
            expected = add(residual * 0.3, residual, weight)
            x = residual * 0.3
            assert_same_bits(add(x, stream, weight, out=x, sum_out=stream), expected)


def test_buffers():
    check_buffers()


def test_launches_and_bits():
    """One launch a pass; the sum has the bits of an addition, and a row those that it has alone."""
    x, residual, weight = inputs(add_rms_norm, 50, 24)
    with record_launches() as launches:
        whole = results(fused_call(add_rms_norm, "triton"), [x, residual, weight])
    assert launches == [("rms_norm_forward", "triton"), ("rms_norm_backward", "triton")]
    assert torch.equal(whole[1], x + residual)
    with use_backend("triton"):
        assert_same_bits([rms_norm(whole[1].detach(), weight, eps=1e-6)], [whole[0]])
        assert_same_bits(add_rms_norm(x[4:5], residual[4:5], weight, eps=1e-6), [out[4:5] for out in whole[:2]])
    assert_same_bits(results(fused_call(add_rms_norm, "triton"), [x, residual, weight]), whole)
