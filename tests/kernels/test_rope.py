"""rope and rope_qkv on CPUs: the formula, views, the inverse as gradient, and invalid arguments."""

import pytest
import torch

from icegrt.kernels import record_launches, rope, rope_qkv, use_backend
from tests.helpers.trunk_cases import (
    assert_same_bits,
    assert_trunk_within_budget,
    fused_call,
    inputs,
    results,
    tables,
)

BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpp"])


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("op", [rope, rope_qkv])
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 2), (5, 6), (70, 64), (33, 100)])
def test_formula_and_gradients(backend, dtype, op, rows, width):
    assert_trunk_within_budget(op, backend, inputs(op, rows, width, dtype))


@BACKENDS
def test_the_gradient_turns_back(backend):
    """A rotation keeps lengths; rotating its result as a gradient gives the argument."""
    q, k, cos, sin = inputs(rope, 30, 32, torch.float64)
    cos, sin = tables(30, 16)
    angle = torch.atan2(sin.double(), cos.double())
    cos, sin = angle.cos(), angle.sin()
    q.requires_grad_(), k.requires_grad_()
    with use_backend(backend):
        turned = rope(q, k, cos, sin)
    torch.testing.assert_close(turned[0].norm(dim=-1), q.norm(dim=-1))
    for back, original in zip(torch.autograd.grad(turned, [q, k], turned), (q, k), strict=True):
        torch.testing.assert_close(back, original)


@BACKENDS
def test_the_fused_projection_is_a_split_and_a_rotation(backend):
    qkv, cos, sin = inputs(rope_qkv, 12, 16)
    with use_backend(backend):
        q, k, v = rope_qkv(qkv, cos, sin)
        split = rope(qkv[:, :, :2].flatten(1, 2), qkv[:, :, 2], cos, sin)
    assert_same_bits([q, k, v], [*split, qkv[:, :, 3]])
    assert all(x.is_contiguous() and x.untyped_storage().data_ptr() != qkv.data_ptr() for x in (q, k, v))


@BACKENDS
@pytest.mark.parametrize("op", [rope, rope_qkv])
def test_views_are_read_in_place(backend, op):
    """Heads of a wider tensor, transposed heads, and a gradient with strides: the results of their copies."""
    *heads, cos, sin = inputs(op, 11, 8)
    for view in (
        [torch.cat([x, x], 1)[:, ::2][:, : x.shape[1]] for x in heads],
        [x.transpose(0, 1).contiguous().transpose(0, 1) for x in heads],
        [x.transpose(1, -1).contiguous().transpose(1, -1) for x in heads],
    ):
        assert not view[0].is_contiguous()
        copies = results(fused_call(op, backend), [*(x.contiguous() for x in view), cos, sin])
        assert_same_bits(results(fused_call(op, backend), [*view, cos, sin]), copies)


def test_a_token_without_an_angle_is_copied():
    q, k, _, _ = inputs(rope, 3, 8, torch.bfloat16)
    for backend in ("reference", "cpp"):
        with use_backend(backend):
            assert_same_bits(rope(q, k, torch.ones(3, 4), torch.zeros(3, 4)), [q, k])


def test_bits_depend_on_the_token_alone():
    *heads, cos, sin = inputs(rope, 3000, 64, torch.bfloat16)
    whole = results(fused_call(rope, "cpp"), [*heads, cos, sin])
    part = results(fused_call(rope, "cpp"), [x[7:8] for x in (*heads, cos, sin)])
    assert_same_bits(part[:2], [x[7:8] for x in whole[:2]])
    with torch.no_grad():
        assert_same_bits(fused_call(rope, "cpp")(*heads, cos, sin), whole[:2])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 3)
        assert_same_bits(results(fused_call(rope, "cpp"), [*heads, cos, sin]), whole)
    finally:
        torch.set_num_threads(threads)


def test_auto_is_cpp_and_errors_name_the_argument():
    q, k, cos, sin = inputs(rope, 4, 8)
    with record_launches() as launches:
        rope(q, k, cos, sin)
        rope_qkv(*inputs(rope_qkv, 4, 8))
    assert launches == [("rope", "cpp")] * 2
    with pytest.raises(ValueError, match=r"rope: cos_TR must have shape \(4, 4\), got \(3, 4\)"):
        rope(q, k, cos[:3], sin)
    with pytest.raises(ValueError, match="rope: k_TGD must have shape"):
        rope(q, k[..., :6], cos, sin)
    with pytest.raises(TypeError, match=r"rope: k_TGD must be torch.float32 like q_TND"):
        rope(q, k.double(), cos, sin)
    with pytest.raises(ValueError, match="rope: heads must have an even number"):
        rope(q[..., :7], k[..., :7], cos, sin)
    with pytest.raises(ValueError, match="rope_qkv: qkv_TGMD must have 3 or more heads"):
        rope_qkv(torch.zeros(4, 2, 2, 8), cos, sin)
    with pytest.raises(RuntimeError, match="rope: double backward"):
        torch.autograd.grad(rope(q.requires_grad_(), k, cos, sin)[0].sum(), q, create_graph=True)
