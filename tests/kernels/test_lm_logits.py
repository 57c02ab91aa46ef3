"""lm_logits: fp32 sums of narrow operands against fp64, static buffers, no copy of the weight, invalid arguments."""

import pytest
import torch

from icegrt.kernels import available_backends, lm_logits, use_backend
from icegrt.kernels.lm_logits import chunked
from tests.helpers.dispatch_records import Recorded
from tests.helpers.kernel_cases import assert_within_budget

BACKENDS = pytest.mark.parametrize("backend", ["reference", "chunked", "cpp"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def operands(rows, vocabulary, width, dtypes=(torch.float32, torch.float32)):
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, width), (vocabulary, width))
    return [torch.randn(*s, generator=generator).to(d) for s, d in zip(shapes, dtypes, strict=True)]


@BACKENDS
@pytest.mark.parametrize(
    "dtypes", [*((d, d) for d in DTYPES), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
@pytest.mark.parametrize(
    ("rows", "vocabulary", "width"), [(1, 1, 1), (5, 300, 40), (0, 3, 4), (3, 0, 4), (33, 1001, 7)]
)
def test_sums_are_wide(backend, dtypes, rows, vocabulary, width, monkeypatch):
    """The error is that of a product of the widened operands, not of halves: several chunks, the last one partial."""
    for name in ("CHUNK_ELEMENTS", "SHARED_CHUNK_ELEMENTS"):
        monkeypatch.setattr(chunked, name, 2800)
    hidden, weight = operands(rows, vocabulary, width, dtypes)
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    memory = torch.full((rows + 1, vocabulary + 3), torch.nan, dtype=wide)
    with use_backend(backend):
        logits = lm_logits(hidden, weight)
        out = lm_logits(hidden, weight, out=memory[:rows, :vocabulary])
    assert logits.dtype == wide and logits.shape == (rows, vocabulary) and torch.equal(out, logits)
    assert memory[:, vocabulary:].isnan().all() and memory[rows].isnan().all()
    truth = hidden.double() @ weight.double().t()
    assert_within_budget(logits, hidden.to(wide) @ weight.to(wide).t(), truth, 1e-6 if wide == torch.float32 else 1e-14)


def test_views_of_the_weight():
    hidden, weight = operands(4, 60, 8, (torch.bfloat16, torch.bfloat16))
    for view in (weight[::2], weight.t().contiguous().t(), torch.cat([weight, weight], 1)[:, 4:12]):
        torch.testing.assert_close(lm_logits(hidden, view), hidden.float() @ view.float().t())


def test_no_copy_of_the_weight(monkeypatch):
    """C++ and fp32 operands allocate nothing; the largest tensor that PyTorch allocates is one chunk."""
    hidden, weight = operands(3, 5000, 128, (torch.bfloat16, torch.bfloat16))
    out, sizes = torch.empty(3, 5000), []
    monkeypatch.setattr(chunked, "SHARED_CHUNK_ELEMENTS", chunked.CHUNK_ELEMENTS)

    class Sizes(Recorded):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = super().__torch_dispatch__(func, types, args, kwargs)
            if func._schema.name in ("aten::empty", "aten::_to_copy"):
                sizes.append(result.numel())
            return result

    with Sizes():
        lm_logits(hidden, weight, out=out)
    assert not sizes
    with Sizes(), use_backend("chunked"):
        lm_logits(hidden, weight, out=out)
        narrow = list(sizes)
        lm_logits(hidden.float(), weight.float(), out=out)
    assert max(narrow) == chunked.CHUNK_ELEMENTS < weight.numel()
    assert sizes[len(narrow) :] == [hidden.numel(), weight.numel()]  # the conversions of this test


def test_errors_name_the_argument():
    assert available_backends("lm_logits") == ("cpp", "chunked", "reference")
    hidden, weight = operands(4, 9, 8)
    out = torch.zeros(4, 9)
    for kind, message, call in (
        (ValueError, r"weight_VH must have shape \(any, 8\)", lambda: lm_logits(hidden, weight[:, :5])),
        (TypeError, "hidden_NH must be floating point", lambda: lm_logits(hidden.long(), weight)),
        (ValueError, "weight_VH must be on cpu", lambda: lm_logits(hidden, weight.to("meta"))),
        (ValueError, "there is no gradient", lambda: lm_logits(hidden, weight.clone().requires_grad_())),
        (ValueError, "out must have shape", lambda: lm_logits(hidden, weight, out=out[:3])),
        (TypeError, "out must be torch.float32", lambda: lm_logits(hidden, weight, out=out.double())),
        (ValueError, "out must have contiguous rows", lambda: lm_logits(hidden, weight, out=torch.zeros(9, 4).t())),
        (
            ValueError,
            "out must not overlap with weight_VH",
            lambda: lm_logits(hidden, weight, out=weight.view(-1)[:36].view(4, 9)),
        ),
    ):
        with pytest.raises(kind, match=f"lm_logits: {message}"):
            call()
    with torch.no_grad():
        lm_logits(hidden, weight.requires_grad_(), out=out)
    assert not out.requires_grad
