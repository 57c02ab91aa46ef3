"""rms_norm and add_rms_norm on CPUs: the formula, views of heads, the sum of the residual, and invalid arguments."""

import pytest
import torch

from icegrt.kernels import add_rms_norm, record_launches, rms_norm, use_backend
from tests.helpers.trunk_cases import (
    assert_same_bits,
    assert_trunk_within_budget,
    fused_call,
    inputs,
    results,
)

BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpp"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("op", [rms_norm, add_rms_norm])
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (3, 7), (130, 32), (65, 100)])
def test_formula_and_gradients(backend, dtype, op, rows, width):
    assert_trunk_within_budget(op, backend, inputs(op, rows, width, dtype))


@BACKENDS
def test_views_of_heads_are_read_in_place(backend):
    """Queries and keys of a fused projection, a transposed tensor, and a broadcast one: the results of their copies."""
    qkv, weight = torch.randn(9, 1, 3, 4, 16), torch.rand(16)
    views = [qkv[..., :2, :], qkv[..., 2, :], qkv[:, 0].transpose(0, 2), qkv[:1].expand(5, -1, -1, -1, -1), qkv[3:4, 0]]
    for view in [*views, qkv.transpose(-1, -2)]:
        w = weight[: view.shape[-1]]
        copy = results(fused_call(rms_norm, backend), [view.clone(memory_format=torch.contiguous_format), w])
        assert_same_bits(results(fused_call(rms_norm, backend), [view, w]), copy)


@BACKENDS
@DTYPES
def test_the_sum_is_that_of_an_addition(backend, dtype):
    """The fused form has the bits of an addition and a norm, so a recomputed layer has those of the layer."""
    x, residual, weight = inputs(add_rms_norm, 40, 24, dtype)
    with use_backend(backend):
        normed, total = add_rms_norm(x, residual, weight, eps=1e-6)
        assert_same_bits([normed, total], [rms_norm(x + residual, weight, eps=1e-6), x + residual])


@pytest.mark.parametrize("op", [rms_norm, add_rms_norm])
def test_bits_depend_on_the_row_alone(op):
    """Neither the batch, nor the threads, nor whether a gradient is formed changes a bit."""
    arguments = inputs(op, 700, 520)
    whole = results(fused_call(op, "cpp"), arguments)
    with torch.no_grad():
        inferred = fused_call(op, "cpp")(*arguments)
    assert_same_bits(whole[: 1 + (op is add_rms_norm)], inferred if isinstance(inferred, tuple) else [inferred])
    part = results(fused_call(op, "cpp"), [*(x[5:6] for x in arguments[:-1]), arguments[-1]])
    assert torch.equal(part[0], whole[0][5:6])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 3)
        assert_same_bits(results(fused_call(op, "cpp"), arguments), whole)
    finally:
        torch.set_num_threads(threads)


def test_the_gradient_of_the_weight_is_summed_in_fp32():
    """4,096 contributions of 1 beside a weight in bf16: summed in bf16 they would stop at 256."""
    x, weight = torch.ones(4096, 8, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16, requires_grad=True)
    for backend in ("reference", "cpp"):
        with use_backend(backend):
            out = rms_norm(x, weight, eps=0.0)
        (grad,) = torch.autograd.grad(out, weight, torch.ones_like(out))
        assert (grad == 4096).all()


@BACKENDS
def test_a_sum_without_a_norm_and_a_norm_without_a_sum(backend):
    x, residual, weight = (t.requires_grad_() for t in inputs(add_rms_norm, 6, 8))
    with use_backend(backend):
        normed, total = add_rms_norm(x, residual, weight)
    upstream = torch.randn_like(total)
    assert_same_bits(torch.autograd.grad(total, [x, residual], upstream, retain_graph=True), [upstream, upstream])
    (grad,) = torch.autograd.grad(normed, x, upstream)
    plain = total.detach().requires_grad_()
    with use_backend("reference"):
        (expected,) = torch.autograd.grad(rms_norm(plain, weight), plain, upstream)
    torch.testing.assert_close(grad, expected)


def test_a_frozen_weight_gets_no_gradient():
    x, weight = inputs(rms_norm, 5, 8)
    out = rms_norm(x.requires_grad_(), weight)
    out.sum().backward()
    assert weight.grad is None and x.grad is not None


def test_nan_stays_in_its_row():
    x, weight = inputs(rms_norm, 4, 20, torch.bfloat16)
    x[2, 0, 3] = torch.nan
    for backend in ("reference", "cpp"):
        with use_backend(backend):
            bad = rms_norm(x, weight).isnan().any(-1).squeeze(1)
        assert bad.tolist() == [False, False, True, False]


def test_auto_is_cpp_and_errors_name_the_argument():
    x, weight = inputs(rms_norm, 4, 8)
    with record_launches() as launches:
        rms_norm(x, weight)
    assert launches == [("rms_norm_forward", "cpp")]
    with pytest.raises(ValueError, match=r"rms_norm: x must have shape \(any, any, 8\)"):
        rms_norm(x[..., :5], weight)
    with pytest.raises(TypeError, match="rms_norm: x must be a tensor"):
        rms_norm(None, weight)
    with pytest.raises(TypeError, match="rms_norm: weight_H must be floating point"):
        rms_norm(x, weight.long())
    with pytest.raises(ValueError, match=r"add_rms_norm: residual must have shape \(4, 1, 8\)"):
        add_rms_norm(x, x[:3], weight)
    with pytest.raises(TypeError, match=r"add_rms_norm: residual must be torch.float32 like x"):
        add_rms_norm(x, x.double(), weight)
    with pytest.raises(ValueError, match="rms_norm: eps must be finite and >= 0"):
        rms_norm(x, weight, eps=-1.0)
    with pytest.raises(ValueError, match="on meta"):
        rms_norm(x, weight.to("meta"))
    with pytest.raises(RuntimeError, match="rms_norm: double backward"):
        torch.autograd.grad(rms_norm(x.requires_grad_(), weight).sum(), x, create_graph=True)
