"""Mutants: one listed change to a kernel's source each, and the check that must notice it.

A test suite that a broken kernel passes proves nothing. `broken(mutant)` writes the kernel's module with one piece of
its text replaced, loads it in the module's place, and the named check must then raise AssertionError (any other error
means that the mutant does not run, which proves nothing either). Run by interpreted/mutants_cases.py.

To add one: the module under kernels/ without `.py`, the kernel, what is broken, the text to replace (it must occur
exactly once) and its replacement, and a check as "<file under tests/interpreted, without .py>:<function>" with its
keyword arguments. A check goes through the public functions, takes no fixtures, and is small: each mutant runs it once.
"""

import contextlib
import functools
import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
CHECKS = Path(__file__).parent / "interpreted"


@dataclass(frozen=True)
class Mutant:
    module: str
    kernel: str
    broken: str
    old: str
    new: str
    check: str
    arguments: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kernel}: {self.broken}"


def _token_logprobs(kernel: str, broken: str, old: str, new: str, check: str, **arguments) -> Mutant:
    module, check = "token_logprobs_triton", f"token_logprobs_cases:{check}"
    return Mutant(module, f"token_logprobs_{kernel}", broken, old, new, check, arguments)


TOKEN_LOGPROBS = (
    _token_logprobs(
        "forward",
        "columns beyond the vocabulary count as logits of 0",
        'column < valid, other=float("-inf"))\n            z = z.to(tl.float32)\n            if SCALED',
        "column < valid, other=0.0)\n            z = z.to(tl.float32)\n            if SCALED",
        "test_error_budget",
        V=7,
        temperature=1.0,
    ),
    _token_logprobs(
        "forward",
        "the running maximum starts at 0",
        'peak = tl.full((), float("-inf"), tl.float32)',
        "peak = tl.full((), 0.0, tl.float32)",
        "check_all_negative_logits",
    ),
    _token_logprobs(
        "forward",
        "a block of -inf is subtracted from itself",
        'safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)',
        "safe = new_peak",
        "check_infinite_logits",
    ),
    _token_logprobs(
        "forward",
        "0 * -inf in the entropy",
        "tl.sum(weight * tl.where(weight > 0.0, distance, 0.0), axis=0)",
        "tl.sum(weight * distance, axis=0)",
        "check_infinite_logits",
    ),
    _token_logprobs(
        "forward",
        "the sum is not rescaled when the maximum rises",
        "total = total * scale + tl.sum(weight, axis=0)",
        "total = total + tl.sum(weight, axis=0)",
        "check_a_maximum_that_rises",
    ),
    _token_logprobs(
        "forward",
        "row offsets in int32",
        "base = logits_ptr + row * row_stride\n        peak",
        "base = logits_ptr + row.to(tl.int32) * row_stride\n        peak",
        "check_row_offsets_beyond_int32",
    ),
    _token_logprobs(
        "backward",
        "ignored rows are left unwritten",
        "tl.store(out, tl.zeros((BLOCK,), grad_ptr.dtype.element_ty), mask=column < columns)",
        "pass",
        "check_ignored_rows_are_written",
    ),
    _token_logprobs(
        "backward",
        "rows without an upstream gradient are read",
        "if (label == IGNORED) | ((g == 0.0) & (h == 0.0)):",
        "if label == IGNORED:",
        "check_rows_without_gradient_are_not_read",
    ),
    _token_logprobs(
        "backward",
        "0 * -inf in the entropy's gradient",
        "tl.where(p > 0.0, logp, 0.0)",
        "logp",
        "check_infinite_logits",
    ),
    _token_logprobs(
        "backward",
        "the gradient takes the logits' memory for dense",
        "out = grad_ptr + row * grad_row_stride +",
        "out = grad_ptr + row * columns +",
        "check_gradient_in_place",
    ),
    _token_logprobs(
        "backward",
        "the temperature is left out of the chain rule",
        "            g = tl.div_rn(g, temperature)\n",
        "",
        "test_error_budget",
        V=7,
        temperature=0.7,
    ),
)

MUTANTS: tuple[Mutant, ...] = TOKEN_LOGPROBS


@contextlib.contextmanager
def broken(mutant: Mutant) -> Iterator[None]:
    """The mutated module in the place of the kernel's; every other Triton module is imported anew around it."""
    package = importlib.import_module("icegrt.kernels")
    dispatch = importlib.import_module("icegrt.kernels.dispatch")
    text = (KERNELS / f"{mutant.module}.py").read_text()
    assert text.count(mutant.old) == 1, f"{mutant}: the text to replace occurs {text.count(mutant.old)} times"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{mutant.module}.py"
        path.write_text(text.replace(mutant.old, mutant.new))
        saved = _forget_triton_modules()
        try:
            # Triton reads a kernel's source from its file, so the mutant needs one.
            name = f"{package.__name__}.{mutant.module}"
            spec = importlib.util.spec_from_file_location(name, path)
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
            dispatch._load.cache_clear()
            yield
        finally:
            _forget_triton_modules()
            sys.modules.update(saved)
            dispatch._load.cache_clear()


def _forget_triton_modules() -> dict:
    names = [n for n in sys.modules if n.startswith("icegrt.kernels.") and n.endswith("_triton")]
    return {name: sys.modules.pop(name) for name in names}


@functools.cache
def check(name: str):
    """The function of "<file under tests/interpreted>:<function>"."""
    file, function = name.split(":")
    spec = importlib.util.spec_from_file_location(f"mutants_{file}", CHECKS / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)
