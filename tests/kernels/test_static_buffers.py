"""Results in the caller's buffers on CPUs: the bits of the allocating call, no allocation, no gradient, no overlap."""

import pytest
import torch

from icegrt.kernels import add_rms_norm, rms_norm, swiglu
from tests.helpers.dispatch_records import Recorded
from tests.helpers.trunk_cases import assert_same_bits, fused_call, inputs

BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpp"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


def buffer(like, width=None):
    return torch.full((*like.shape[:-1], width or like.shape[-1]), torch.nan, dtype=like.dtype)


@BACKENDS
@DTYPES
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 1), (33, 70)])
def test_results_are_those_of_the_allocating_call(backend, dtype, rows, width):
    norm, add, activate = (fused_call(op, backend) for op in (rms_norm, add_rms_norm, swiglu))
    x, residual, weight = inputs(add_rms_norm, rows, width, dtype)
    out, total = buffer(x), buffer(x)
    assert norm(x, weight, out=out) is out
    assert_same_bits([out], [norm(x, weight)])
    results = add(x, residual, weight, out=out, sum_out=total)
    assert results[0] is out and results[1] is total
    assert_same_bits(results, add(x, residual, weight))
    (gate_up,) = inputs(swiglu, rows, width, dtype)
    out = buffer(gate_up, width)
    assert activate(gate_up, out=out) is out
    assert_same_bits([out], [activate(gate_up)])


@BACKENDS
@DTYPES
def test_a_residual_stream_in_place(backend, dtype):
    """The sum over x or the residual, the norm over the other one; rows longer than a vector, with a rest."""
    x, residual, weight = inputs(add_rms_norm, 9, 75, dtype)
    call = fused_call(add_rms_norm, backend)
    expected = call(x, residual, weight)
    for sum_is, out_is in ((0, None), (1, None), (1, 0), (0, 1), (None, 0)):
        rows = [x.clone(), residual.clone()]
        buffers = {"sum_out": buffer(x) if sum_is is None else rows[sum_is]}
        buffers["out"] = buffer(x) if out_is is None else rows[out_is]
        assert_same_bits(call(*rows, weight, **buffers), expected)
    inside = x.clone()
    assert_same_bits(
        [fused_call(rms_norm, backend)(inside, weight, out=inside)], [fused_call(rms_norm, backend)(x, weight)]
    )


@BACKENDS
def test_heads_of_a_projection_are_normed_in_place(backend):
    """Only the queries change; their bits are those of a copy."""
    qkv, weight = torch.randn(9, 3, 4, 16), torch.rand(16)
    queries, rest = qkv[:, :, :2], qkv[:, :, 2:].clone()
    expected = fused_call(rms_norm, backend)(queries.clone(), weight)
    fused_call(rms_norm, backend)(queries, weight, out=queries)
    assert_same_bits([queries, qkv[:, :, 2:]], [expected, rest])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_cpp_allocates_no_tensor(dtype):
    x, residual, weight = inputs(add_rms_norm, 7, 64, dtype)
    (gate_up,) = inputs(swiglu, 7, 64, dtype)
    out, total = buffer(x), buffer(x)
    with torch.no_grad(), Recorded() as recorded:
        fused_call(rms_norm, "cpp")(x, weight, out=out)
        fused_call(add_rms_norm, "cpp")(x, residual, weight, out=out, sum_out=total)
        fused_call(add_rms_norm, "cpp")(x, residual, weight, out=out, sum_out=residual)
        fused_call(swiglu, "cpp")(gate_up, out=out)
    assert recorded.names == []
    with Recorded() as recorded:
        fused_call(rms_norm, "cpp")(x, weight)
    assert recorded.names == ["aten::new_empty"]  # without a gradient the result is all that is allocated


def test_buffers_are_refused_by_name():
    x, residual, weight = inputs(add_rms_norm, 4, 8)
    out, (gate_up,) = buffer(x), inputs(swiglu, 4, 8)
    memory = torch.zeros(9, 1, 8)
    leaf = x.clone().requires_grad_()
    for kind, message, call in (
        (ValueError, "rms_norm: out takes no gradient", lambda: rms_norm(leaf, weight, out=out)),
        (ValueError, "rms_norm: out takes no gradient", lambda: rms_norm(x, weight, out=leaf)),
        (ValueError, "swiglu: out takes no gradient", lambda: swiglu(gate_up.clone().requires_grad_(), out=out)),
        (ValueError, "sum_out takes no gradient", lambda: add_rms_norm(x, leaf, weight, sum_out=out)),
        (ValueError, r"out must have shape \(4, 1, 8\)", lambda: rms_norm(x, weight, out=out[:3])),
        (TypeError, "out must be torch.float32 like the result", lambda: rms_norm(x, weight, out=out.double())),
        (ValueError, "out must be on cpu", lambda: rms_norm(x, weight, out=out.to("meta"))),
        (
            ValueError,
            "rows of out must be contiguous",
            lambda: rms_norm(x, weight, out=torch.zeros(4, 1, 16)[..., ::2]),
        ),
        (ValueError, "out must not be expanded", lambda: rms_norm(x, weight, out=torch.zeros(8).expand(4, 1, 8))),
        (ValueError, "out must not overlap with x, unless", lambda: rms_norm(memory[:4], weight, out=memory[3:7])),
        (
            ValueError,
            "sum_out must not overlap with residual, unless",
            lambda: add_rms_norm(x, memory[:4], weight, sum_out=memory[1:5]),
        ),
        (
            ValueError,
            "sum_out must be contiguous",
            lambda: add_rms_norm(x, x, weight, sum_out=torch.zeros(8, 1, 8)[::2]),
        ),
        (
            ValueError,
            "out must not overlap with sum_out$",
            lambda: add_rms_norm(x, residual, weight, out=residual, sum_out=residual),
        ),
        (ValueError, "out must be contiguous", lambda: swiglu(gate_up, out=torch.zeros(8, 1, 8)[::2])),
        (ValueError, "out must not overlap with gate_up", lambda: swiglu(gate_up, out=gate_up.view(8, 1, 8)[:4])),
    ):
        with pytest.raises(kind, match=message):
            call()
    with torch.no_grad():
        assert_same_bits([rms_norm(leaf, weight, out=out)], [rms_norm(x, weight)])
