"""Mutants of value_loss."""

from tests.kernels.mutants.mutation import Mutant
from tests.kernels.triton.test_value_loss import check_masked_entries_do_not_matter, check_value

MODULE = "value_loss.triton"
FUNCTION, KERNEL = "value_loss_kernel", "value_loss"

MUTANTS = (
    Mutant(
        MODULE,
        FUNCTION,
        "the mask is dropped",
        "tl.load(mask_ptr + index, mask=index < mask_size, other=1) != 0",
        "tl.load(mask_ptr + index, mask=index < mask_size, other=1) >= 0",
        check_masked_entries_do_not_matter,
        kernel=KERNEL,
    ),
    Mutant(
        MODULE,
        FUNCTION,
        "the tail of the last program counts",
        "inside & (tl.load(mask_ptr + index, mask=index < mask_size, other=1) != 0)",
        "tl.load(mask_ptr + index, mask=index < mask_size, other=1) != 0",
        check_value,
        kernel=KERNEL,
    ),
    Mutant(
        MODULE,
        FUNCTION,
        "the smaller error is taken",
        "bounded > plain",
        "bounded < plain",
        check_value,
        kernel=KERNEL,
    ),
    Mutant(
        MODULE,
        FUNCTION,
        "the clip is one-sided",
        "tl.maximum(value - old, -clip)",
        "value - old",
        check_value,
        kernel=KERNEL,
    ),
)
