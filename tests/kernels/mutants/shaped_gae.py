"""Mutants of shaped_gae."""

from tests.kernels.mutants.mutation import Mutant
from tests.kernels.triton.test_shaped_gae import (
    check_a_tail_that_is_masked,
    check_error_budget,
    check_many_sequences_of_one_token,
    check_masked_nan_does_not_leak,
)

MODULE = "shaped_gae.triton"
KERNEL = "shaped_gae_kernel"

MUTANTS = (
    Mutant(
        MODULE,
        KERNEL,
        "the segment's reset is dropped: chunks of the sequence before are looked back at",
        "past < chunk[:, None]",
        "past < chunk[:, None] + first_slot[:, None]",
        check_error_budget,
        {"lengths": [9, 9]},
    ),
    Mutant(
        MODULE,
        KERNEL,
        "no carry between chunks",
        "ra * advantage_in + rb * pending_in + rc",
        "advantage_in * 1.0",
        check_error_budget,
        {"lengths": [30]},
    ),
    Mutant(
        MODULE,
        KERNEL,
        "a chunk's first entries are lost: the tail mask is one too strict",
        "t >= begin[:, None]",
        "t > begin[:, None]",
        check_error_budget,
        {"lengths": [3, 5]},
    ),
    Mutant(
        MODULE,
        KERNEL,
        "masked entries decay the carry",
        "tl.where(keep, decay, 1.0)",
        "tl.where(in_chunk, decay, 1.0)",
        check_error_budget,
        {"lengths": [9], "masked": True},
    ),
    Mutant(
        MODULE,
        KERNEL,
        "masked entries cut the value behind them off",
        "tl.where(keep, 0.0, 1.0)",
        "tl.where(in_chunk, 0.0, 1.0)",
        check_error_budget,
        {"lengths": [9], "masked": True},
    ),
    Mutant(
        MODULE,
        KERNEL,
        "masked entries are read",
        "keep & (t < reference_size)",
        "in_chunk & (t < reference_size)",
        check_masked_nan_does_not_leak,
    ),
    Mutant(
        MODULE,
        KERNEL,
        "the score lands on the last action of every chunk",
        "untaken_in > 0.0",
        "score == score",
        check_a_tail_that_is_masked,
    ),
    Mutant(
        MODULE,
        "_find_sequence",
        "the search for the sequence takes one step less",
        "stride > 0",
        "stride > 1",
        check_many_sequences_of_one_token,
        {"N": 9},
        kernel=KERNEL,
    ),
    Mutant(
        MODULE,
        KERNEL,
        "the penalty is added, not subtracted",
        "-coef * kl",
        "coef * kl",
        check_error_budget,
        {"lengths": [3]},
    ),
)
