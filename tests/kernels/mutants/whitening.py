"""Mutants of masked_moments and whiten."""

from tests.kernels.mutants.mutation import Mutant
from tests.kernels.triton.test_whitening import check_moments, check_whiten

MODULE = "whitening.triton"

MUTANTS = (
    Mutant(
        MODULE,
        "finish_moments",
        "blocks are merged without the distance of their means",
        "squares += n * delta * delta",
        "pass",
        check_moments,
        kernel="masked_moments_kernel",
    ),
    Mutant(
        MODULE,
        "masked_moments_kernel",
        "masked entries are read",
        "tl.load(x_ptr + offsets, mask=keep, other=0.0)",
        "tl.load(x_ptr + offsets, mask=offsets < size, other=0.0)",
        check_moments,
    ),
    Mutant(
        MODULE,
        "masked_moments_kernel",
        "sums in fp32",
        "tl.load(x_ptr + offsets, mask=keep, other=0.0).to(tl.float64)",
        "tl.load(x_ptr + offsets, mask=keep, other=0.0)",
        check_moments,
    ),
    Mutant(
        MODULE,
        "whiten_kernel",
        "the mean stays out where it should be left in",
        "(x - mean) * scale + mean",
        "(x - mean) * scale",
        check_whiten,
    ),
)
