"""swiglu on CPUs: the formula, its extremes, and invalid arguments."""

import math

import pytest
import torch

from icegrt.kernels import record_launches, swiglu, use_backend
from tests.helpers.trunk_cases import assert_same_bits, assert_trunk_within_budget, fused_call, inputs, results

BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpp"])


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (5, 7), (70, 64), (33, 100)])
def test_formula_and_gradients(backend, dtype, rows, width):
    assert_trunk_within_budget(swiglu, backend, inputs(swiglu, rows, width, dtype))


@BACKENDS
def test_gates_of_every_size(backend):
    """From -200 to 200, where exp overflows fp32 on one side: within a few roundings of fp64 everywhere."""
    gate = torch.cat([torch.linspace(-200, 200, 4001), torch.linspace(-20, 20, 4001)])
    leaf = torch.stack([gate, torch.ones_like(gate)], dim=1).requires_grad_()
    with use_backend(backend):
        out = swiglu(leaf)
    (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    exact = leaf.detach().double().requires_grad_()
    with use_backend("reference"):
        truth = swiglu(exact)
    (slope,) = torch.autograd.grad(truth, exact, torch.ones_like(truth))
    torch.testing.assert_close(out.double(), truth, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(grad.double(), slope, rtol=2e-6, atol=2e-7)


@BACKENDS
def test_infinity_and_nan(backend):
    gate_up = torch.tensor([[math.inf, 2.0], [math.nan, 1.0], [1.0, math.nan], [3.0, math.inf]])
    with use_backend(backend):
        out = swiglu(gate_up).squeeze(1)
    assert out[0] == math.inf and out[1].isnan() and out[2].isnan() and out[3] == math.inf


def test_bits_depend_on_the_row_alone():
    (gate_up,) = inputs(swiglu, 900, 500, torch.bfloat16)
    whole = results(fused_call(swiglu, "cpp"), [gate_up])
    assert torch.equal(fused_call(swiglu, "cpp")(gate_up[7:8]), whole[0][7:8])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 3)
        assert_same_bits(results(fused_call(swiglu, "cpp"), [gate_up]), whole)
    finally:
        torch.set_num_threads(threads)


def test_views():
    wide = torch.randn(6, 40)
    for view in (wide[:, 10:30], wide.t(), wide[0], wide[:1].expand(3, -1)):
        assert_same_bits(
            results(fused_call(swiglu, "cpp"), [view]), results(fused_call(swiglu, "cpp"), [view.contiguous()])
        )


def test_nothing_but_the_argument_is_saved():
    leaf = inputs(swiglu, 5, 8)[0].requires_grad_()
    with use_backend("cpp"):
        out = swiglu(leaf)
    assert [x.data_ptr() for x in out.grad_fn.saved_tensors] == [leaf.data_ptr()]


def test_auto_is_cpp_and_errors_name_the_argument():
    (x,) = inputs(swiglu, 4, 8)
    with record_launches() as launches:
        swiglu(x)
    assert launches == [("swiglu_forward", "cpp")]
    with pytest.raises(ValueError, match=r"swiglu: gate_up must have an even last dimension, got shape \(4, 1, 15\)"):
        swiglu(x[..., :15])
    with pytest.raises(TypeError, match="swiglu: gate_up must be floating point"):
        swiglu(x.long())
    with pytest.raises(TypeError, match="swiglu: gate_up must be a tensor"):
        swiglu([1.0, 2.0])
    with pytest.raises(RuntimeError, match="swiglu: double backward"):
        torch.autograd.grad(swiglu(x.requires_grad_()).sum(), x, create_graph=True)
