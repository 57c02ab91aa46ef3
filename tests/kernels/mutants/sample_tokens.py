"""Mutants of sample_tokens."""

from tests.kernels.mutants.mutation import Mutant
from tests.kernels.triton.test_sample_tokens import (
    check_far_from_zero,
    check_negative_infinite_and_tied_logits,
    check_padding,
    check_row_offsets_beyond_int32,
    check_tokens,
    check_truncation_among_equals,
)

MODULE = "sample_tokens.triton"
KERNEL = "sample_tokens_kernel"

MUTANTS = (
    Mutant(
        MODULE,
        "_load_z",
        "columns beyond the vocabulary count as logits of 0",
        '-float("inf")',
        "0.0",
        check_padding,
        kernel=KERNEL,
    ),
    Mutant(
        MODULE,
        KERNEL,
        "the running maximum of the log-sum-exp starts at 0",
        'online_max = tl.full((), -float("inf"), tl.float32)',
        "online_max = tl.full((), 0.0, tl.float32)",
        check_negative_infinite_and_tied_logits,
    ),
    Mutant(
        MODULE,
        KERNEL,
        "ties go to the highest id",
        "highest > best",
        "highest >= best",
        check_negative_infinite_and_tied_logits,
    ),
    Mutant(
        MODULE,
        KERNEL,
        "the temperature is left out of the draw",
        "perturbed * inverse_temperature",
        "perturbed",
        check_tokens,
        {"temperature": 0.3},
    ),
    Mutant(
        MODULE,
        "_over_temperature",
        "the temperature is left out of the log-prob",
        "tl.div_rn(shifted, tl.full(shifted.shape, 0.0, tl.float32) + temperature)",
        "shifted",
        check_tokens,
        {"temperature": 0.3},
        kernel=KERNEL,
    ),
    Mutant(
        MODULE,
        KERNEL,
        "logits are divided in fp32",
        "perturbed * inverse_temperature",
        "(perturbed * inverse_temperature).to(tl.float32)",
        check_far_from_zero,
    ),
    Mutant(
        MODULE,
        "candidate_hash",
        "another hash",
        "x >> 15",
        "x >> 14",
        check_tokens,
        kernel=KERNEL,
    ),
    Mutant(
        MODULE,
        KERNEL,
        "a block's noise starts at 0 again",
        "start + column",
        "start + lane",
        check_tokens,
    ),
    Mutant(
        MODULE,
        "_survives",
        "all equals of the last value survive",
        "(key == last_key) & (column <= last_id)",
        "key == last_key",
        check_truncation_among_equals,
        kernel=KERNEL,
    ),
    Mutant(
        MODULE,
        KERNEL,
        "row offsets in int32",
        "n * row_stride",
        "n.to(tl.int32) * row_stride",
        check_row_offsets_beyond_int32,
    ),
)
