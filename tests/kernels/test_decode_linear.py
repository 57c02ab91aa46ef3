"""decode_linear: sums against fp64, in C++ (cpp.py) rows without influence on each other, static buffers, errors."""

import pytest
import torch

from icegrt.kernels import available_backends, decode_linear, use_backend
from icegrt.kernels.decode_linear import cpp
from tests.helpers.kernel_cases import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def operands(rows, outputs, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows + outputs)
    return [torch.randn(*s, generator=generator).to(dtype) for s in ((rows, width), (outputs, width), (outputs,))]


@pytest.fixture(params=["cpp", "emulated", "reference"])
def backend(request, monkeypatch):
    """Each backend; "emulated" is C++ on a processor without instructions for bf16."""
    if request.param != "reference":
        monkeypatch.setattr(cpp, "_multiplies_bfloat16", lambda: request.param == "cpp")
    with use_backend("reference" if request.param == "reference" else "cpp"):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "outputs", "width"),
    [(1, 1, 1), (3, 0, 5), (0, 3, 4), (5, 13, 64), (9, 37, 31), (131, 20, 48), (2, 7, 0)],
)
def test_sums_are_wide_and_rounded_once(backend, dtype, rows, outputs, width):
    x, weight, bias = operands(rows, outputs, width, dtype)
    for b in (None, bias):
        truth = x.double() @ weight.double().t() + (0 if b is None else b.double())
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        plain = (x.to(wide) @ weight.to(wide).t() + (0 if b is None else b.to(wide))).to(dtype)
        result = decode_linear(x, weight, b)
        assert result.dtype == dtype and result.shape == truth.shape
        # One step of the dtype at the largest result, beside the error of the same sum in PyTorch. The truth has no
        # more digits than fp64 itself.
        step = torch.finfo(dtype).eps * max(1.0, truth.abs().max().item() if truth.numel() else 0.0)
        step *= 16 if dtype == torch.float64 else 1
        assert_within_budget(result, plain, truth, step)


def test_views_and_a_buffer(backend):
    x, weight, bias = operands(6, 9, 20)
    expected = x @ weight.t() + bias
    out = torch.full((6, 9), torch.nan)
    assert decode_linear(x, weight, bias, out=out) is out
    torch.testing.assert_close(out, expected)
    wide_x, wide_weight = torch.cat([x, x], 1), torch.cat([weight, weight], 1)
    for rows in (x.t().contiguous().t(), wide_x[:, 20:]):
        for matrix in (weight.t().contiguous().t(), wide_weight[:, 20:]):
            torch.testing.assert_close(decode_linear(rows, matrix, bias), expected)


@pytest.mark.parametrize("width", [64, 77])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_bits_of_a_row_depend_on_that_row_alone(dtype, width):
    """Whatever the number of rows, their order and the number of threads; tiles, remainders and panels included."""
    x, weight, bias = operands(150, 61, width, dtype)
    alone = torch.cat([decode_linear(row[None], weight, bias) for row in x])
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for rows in (2, 4, 7, 129, 150):
                assert torch.equal(decode_linear(x[:rows], weight, bias), alone[:rows])
            order = torch.randperm(150, generator=torch.Generator().manual_seed(1))
            assert torch.equal(decode_linear(x[order], weight, bias), alone[order])
    finally:
        torch.set_num_threads(threads)


def test_a_row_that_is_not_finite_stays_alone():
    x, weight, _ = operands(5, 8, 20)
    expected = decode_linear(x, weight)
    x[2] = torch.nan
    result = decode_linear(x, weight)
    assert result[2].isnan().all() and torch.equal(result[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


def test_errors_name_the_argument():
    assert available_backends("decode_linear") == ("cpp", "reference")
    x, weight, bias = operands(4, 9, 8)
    out = torch.zeros(4, 9)
    for kind, message, call in (
        (ValueError, r"weight_MK must have shape \(any, 8\)", lambda: decode_linear(x, weight[:, :5])),
        (TypeError, "weight_MK must be torch.float32 like x_NK", lambda: decode_linear(x, weight.double())),
        (ValueError, r"bias_M must have shape \(9\)", lambda: decode_linear(x, weight, bias[:3])),
        (TypeError, "x_NK must be floating point", lambda: decode_linear(x.long(), weight)),
        (ValueError, "weight_MK must be on cpu", lambda: decode_linear(x, weight.to("meta"))),
        (ValueError, "there is no gradient", lambda: decode_linear(x, weight.clone().requires_grad_())),
        (ValueError, "out must have shape", lambda: decode_linear(x, weight, out=out[:3])),
        (TypeError, "out must be torch.float32", lambda: decode_linear(x, weight, out=out.double())),
        (ValueError, "out must be contiguous", lambda: decode_linear(x, weight, out=torch.zeros(9, 4).t())),
        (
            ValueError,
            "out must not overlap with weight_MK",
            lambda: decode_linear(x, weight, out=weight.view(-1)[:36].view(4, 9)),
        ),
    ):
        with pytest.raises(kind, match=f"decode_linear: {message}"):
            call()
    with torch.no_grad():
        decode_linear(x, weight.requires_grad_(), out=out)
    assert not out.requires_grad
