"""Mutants of token_logprobs."""

from tests.kernels.mutants.mutation import Mutant
from tests.kernels.triton.test_token_logprobs import (
    check_a_maximum_that_rises,
    check_all_negative_logits,
    check_gradient_in_place,
    check_ignored_rows_are_written,
    check_infinite_logits,
    check_row_offsets_beyond_int32,
    check_rows_without_gradient_are_not_read,
    test_error_budget,
)

MODULE = "token_logprobs.triton"
FORWARD, BACKWARD = "token_logprobs_forward", "token_logprobs_backward"

MUTANTS = (
    Mutant(
        MODULE,
        FORWARD,
        "columns beyond the vocabulary count as logits of 0",
        'tl.load(base + column.to(tl.int64) * column_stride, mask=column < valid, other=float("-inf"))',
        "tl.load(base + column.to(tl.int64) * column_stride, mask=column < valid, other=0.0)",
        test_error_budget,
        {"V": 7, "temperature": 1.0},
    ),
    Mutant(
        MODULE,
        FORWARD,
        "the running maximum starts at 0",
        'tl.full((), float("-inf"), tl.float32)',
        "tl.full((), 0.0, tl.float32)",
        check_all_negative_logits,
    ),
    Mutant(
        MODULE,
        FORWARD,
        "a block of -inf is subtracted from itself",
        'tl.where(new_max == float("-inf"), 0.0, new_max)',
        "new_max",
        check_infinite_logits,
    ),
    Mutant(
        MODULE,
        FORWARD,
        "0 * -inf in the entropy",
        "tl.where(weight > 0.0, distance, 0.0)",
        "distance",
        check_infinite_logits,
    ),
    Mutant(
        MODULE,
        FORWARD,
        "the sum is not rescaled when the maximum rises",
        "tl.fma(sum_exp, scale, tl.sum(weight, axis=0))",
        "sum_exp + tl.sum(weight, axis=0)",
        check_a_maximum_that_rises,
    ),
    Mutant(
        MODULE,
        FORWARD,
        "row offsets in int32",
        "row * row_stride",
        "row.to(tl.int32) * row_stride",
        check_row_offsets_beyond_int32,
    ),
    Mutant(
        MODULE,
        BACKWARD,
        "ignored rows are left unwritten",
        "tl.store(out, tl.zeros((BLOCK,), grad_ptr.dtype.element_ty), mask=column < columns)",
        "pass",
        check_ignored_rows_are_written,
    ),
    Mutant(
        MODULE,
        BACKWARD,
        "rows without an upstream gradient are read",
        "(label == IGNORED) | ((grad_logprob == 0.0) & (grad_entropy == 0.0))",
        "label == IGNORED",
        check_rows_without_gradient_are_not_read,
    ),
    Mutant(
        MODULE,
        BACKWARD,
        "0 * -inf in the entropy's gradient",
        "tl.where(p > 0.0, logp, 0.0)",
        "logp",
        check_infinite_logits,
    ),
    Mutant(
        MODULE,
        BACKWARD,
        "the gradient takes the logits' memory for dense",
        "row * grad_row_stride",
        "row * columns",
        check_gradient_in_place,
    ),
    Mutant(
        MODULE,
        BACKWARD,
        "the temperature is left out of the chain rule",
        "grad_logprob = tl.div_rn(grad_logprob, temperature)",
        "pass",
        test_error_budget,
        {"V": 7, "temperature": 0.7},
    ),
)
