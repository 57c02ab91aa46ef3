"""Mutants: one listed change to a kernel's source each, and the check that must notice it.

A test suite that a broken kernel passes proves nothing. `broken(mutant)` writes the kernel's module with one piece of
its text replaced, loads it in the module's place, and the named check must then raise AssertionError (any other error
means that the mutant does not run, which proves nothing either). Run by test_mutants.py.

To add one: the module under kernels/ without `.py`, the kernel, what is broken, the text to replace (it must occur
exactly once) and its replacement, and a check as "<file under tests/kernels/triton, without .py>:<function>" with its
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

KERNELS = Path(__file__).resolve().parents[3] / "kernels"
CHECKS = Path(__file__).parents[1] / "triton"


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
    module, check = "token_logprobs.triton", f"token_logprobs:{check}"
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
        "total = tl.fma(total, scale, tl.sum(weight, axis=0))",
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


def _policy(broken: str, old: str, new: str, check: str, **arguments) -> Mutant:
    module, check = "ppo_policy_loss.triton", f"losses:{check}"
    return Mutant(module, "ppo_policy_loss", broken, old, new, check, arguments)


def _value(broken: str, old: str, new: str, check: str, **arguments) -> Mutant:
    return Mutant("value_loss.triton", "value_loss", broken, old, new, f"losses:{check}", arguments)


LOSSES = (
    _policy("the mask is dropped", "other=1) != 0)", "other=1) >= 0)", "check_masked_entries_do_not_matter"),
    _policy("the tail of the last program counts", "    keep = inside & (", "    keep = (", "check_policy"),
    Mutant(
        "common.triton",
        "ppo_policy_loss",
        "the ratio's exponent is not bounded",
        "return tl.exp(bounded) +",
        "return tl.exp(x) +",
        "losses:check_policy_extremes",
    ),
    _policy(
        "clipped tokens keep their gradient", "tl.where(clipped | dual, 0.0,", "tl.where(dual, 0.0,", "check_policy"
    ),
    _policy("no dual clip", "dual = (advantage < 0.0) &", "dual = (advantage < -1e9) &", "check_policy", dual=1.5),
    _policy(
        "k3's own gradient instead of k2's",
        "        if RAW:\n            slope = 1.0 - tl",
        "        if True:\n            slope = 1.0 - tl",
        "check_policy",
    ),
    _policy("the mean is not subtracted", "white = (advantage - mean)", "white = advantage", "check_policy"),
    Mutant(
        "common.triton",
        "fold_statistics",
        "only the first rows of statistics are added",
        "for first in range(0, programs, BLOCK):",
        "for first in range(0, 1, BLOCK):\n        programs = 1",
        "losses:check_policy",
    ),
    _value("the mask is dropped", "other=1) != 0)", "other=1) >= 0)", "check_masked_entries_do_not_matter", op="value"),
    _value("the tail of the last program counts", "    keep = inside & (", "    keep = (", "check_value"),
    _value("the smaller error is taken", "(bounded > plain)", "(bounded < plain)", "check_value"),
    _value("the clip is one-sided", "tl.maximum(value - old, -clip)", "(value - old)", "check_value"),
)

LINEAR = (
    Mutant(
        "token_logprobs.triton",
        "token_logprobs_backward",
        "compacted rows are read at their new place",
        "        row = tl.load(live_ptr + row).to(tl.int64)\n",
        "        row = row + 0\n",
        "linear:check_loss",
        {"masked": False, "clip_low": 0.01, "clip_high": 0.01},
    ),
    Mutant(
        "linear.triton",
        "linear_ppo_loss",
        "the shift of the labels is forgotten in the gradient",
        "gradient_launch(z, labels, rows, entropy, g, h, out, active, start,",
        "gradient_launch(z, labels, rows, entropy, g, h, out, active, start + 1,",
        "linear:check_loss",
    ),
)


def _mutants(module: str, kernel: str, cases: str, *rows) -> tuple[Mutant, ...]:
    """Mutants of one kernel: (what is broken, text to replace, replacement, check, its arguments)."""
    return tuple(Mutant(module, kernel, *row[:3], f"{cases}:{row[3]}", *row[4:]) for row in rows)


SHAPED_GAE = _mutants(
    "shaped_gae.triton",
    "shaped_gae_kernel",
    "shaped_gae",
    (
        "the segment's reset is dropped: chunks of the sequence before are looked back at",
        "behind = past < chunk[:, None]",
        "behind = past < chunk[:, None] + first_slot[:, None]",
        "check_error_budget",
        {"lengths": [9, 9]},
    ),
    (
        "no carry between chunks",
        "advantage_in = ra * advantage_in + rb * pending_in + rc\n",
        "advantage_in = advantage_in * 1.0\n",
        "check_error_budget",
        {"lengths": [30]},
    ),
    (
        "a chunk's first entries are lost: the tail mask is one too strict",
        "live = t >= begin[:, None]",
        "live = t > begin[:, None]",
        "check_error_budget",
        {"lengths": [3, 5]},
    ),
    (
        "masked entries decay the carry",
        "a = tl.where(keep, decay, 1.0)",
        "a = tl.where(live, decay, 1.0)",
        "check_error_budget",
        {"lengths": [9], "masked": True},
    ),
    (
        "masked entries cut the value behind them off",
        "e = tl.where(keep, 0.0, 1.0)",
        "e = tl.where(live, 0.0, 1.0)",
        "check_error_budget",
        {"lengths": [9], "masked": True},
    ),
    (
        "masked entries are read",
        "charged = keep & (t < reference_size)",
        "charged = live & (t < reference_size)",
        "check_masked_nan_does_not_leak",
    ),
    (
        "the score lands on the last action of every chunk",
        "& (untaken_in > 0.0)[:, None]",
        "& (score == score)[:, None]",
        "check_a_tail_that_is_masked",
    ),
    (
        "the search for the sequence takes one step less",
        "while stride > 0:",
        "while stride > 1:",
        "check_many_sequences_of_one_token",
        {"N": 9},
    ),
    (
        "the penalty is added, not subtracted",
        "-coef * kl, 0.0)",
        "coef * kl, 0.0)",
        "check_error_budget",
        {"lengths": [3]},
    ),
)

SAMPLE_TOKENS = _mutants(
    "sample_tokens.triton",
    "sample_tokens_kernel",
    "sample_tokens",
    (
        "columns beyond the vocabulary count as logits of 0",
        'mask=at < columns, other=-float("inf"))',
        "mask=at < columns, other=0.0)",
        "check_padding",
    ),
    (
        "the running maximum of the log-sum-exp starts at 0",
        'peak = tl.full((), -float("inf"), tl.float32)',
        "peak = tl.full((), 0.0, tl.float32)",
        "check_negative_infinite_and_tied_logits",
    ),
    (
        "ties go to the highest id",
        "better = highest > best",
        "better = highest >= best",
        "check_negative_infinite_and_tied_logits",
    ),
    (
        "the temperature is left out",
        "return tl.div_rn(z, tl.full(z.shape, 0.0, tl.float32) + temperature)",
        "return z",
        "check_tokens",
        {"temperature": 0.3},
    ),
    (
        "another hash",
        "x = x ^ (x >> 15)",
        "x = x ^ (x >> 14)",
        "check_tokens",
    ),
    (
        "a block's noise starts at 0 again",
        "gumbel(candidate_hash(key, start + at))",
        "gumbel(candidate_hash(key, start + lane))",
        "check_tokens",
    ),
    (
        "all equals of the last value survive",
        "((key == last) & (at <= cut))",
        "(key == last)",
        "check_truncation_among_equals",
    ),
    (
        "row offsets in int32",
        "row_ptr = logits_ptr + n * row_stride",
        "row_ptr = logits_ptr + n.to(tl.int32) * row_stride",
        "check_row_offsets_beyond_int32",
    ),
)

ELEMENTWISE = (
    *_mutants(
        "kl_divergence.triton",
        "kl_forward_kernel",
        "elementwise",
        (
            "k3 overflows",
            "bounded = tl.minimum(x, LIMIT)",
            "bounded = x",
            "check_kl",
        ),
        (
            "k3 cancels near 0",
            "tl.where(tl.abs(x) < 0.5, x * x * series, plain)",
            "plain",
            "check_kl",
        ),
    ),
    *_mutants(
        "kl_divergence.triton",
        "kl_backward_kernel",
        "elementwise",
        (
            "the reference's gradient has the sign of the policy's",
            "tl.store(ref_grad_ptr + at, -grad, mask=here)",
            "tl.store(ref_grad_ptr + at, grad, mask=here)",
            "check_kl",
        ),
    ),
    *_mutants(
        "whitening.triton",
        "masked_moments_kernel",
        "elementwise",
        (
            "blocks are merged without the distance of their means",
            "squares += n * off * off\n",
            "pass\n",
            "check_moments",
        ),
        (
            "masked entries are read",
            "x = tl.load(x_ptr + at, mask=keep, other=0.0).to(tl.float64)",
            "x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float64)",
            "check_moments",
        ),
        (
            "sums in fp32",
            "x = tl.load(x_ptr + at, mask=keep, other=0.0).to(tl.float64)",
            "x = tl.load(x_ptr + at, mask=keep, other=0.0)",
            "check_moments",
        ),
    ),
    *_mutants(
        "whitening.triton",
        "whiten_kernel",
        "elementwise",
        (
            "the mean stays out where it should be left in",
            "out = (x - mean) * scale + mean",
            "out = (x - mean) * scale",
            "check_whiten",
        ),
    ),
)

MUTANTS: tuple[Mutant, ...] = (*TOKEN_LOGPROBS, *LOSSES, *LINEAR, *SHAPED_GAE, *SAMPLE_TOKENS, *ELEMENTWISE)


@contextlib.contextmanager
def broken(mutant: Mutant) -> Iterator[None]:
    """The mutated module in the place of the kernel's; every other Triton module is imported anew around it."""
    package = importlib.import_module("icegrt.kernels")
    dispatch = importlib.import_module("icegrt.kernels.dispatch")
    text = (KERNELS / f"{mutant.module.replace('.', '/')}.py").read_text()
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
    names = [n for n in sys.modules if n.startswith("icegrt.kernels.") and n.endswith(".triton")]
    return {name: sys.modules.pop(name) for name in names}


@functools.cache
def check(name: str):
    """The function of "<file under tests/kernels/triton>:<function>"."""
    file, function = name.split(":")
    spec = importlib.util.spec_from_file_location(f"mutants_{file}", CHECKS / f"test_{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)
