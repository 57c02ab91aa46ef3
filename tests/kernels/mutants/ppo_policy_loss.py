"""Mutants of ppo_policy_loss and of the parts of common.triton that it runs on."""

from tests.kernels.mutants.mutation import Mutant
from tests.kernels.triton.test_ppo_policy_loss import (
    check_masked_entries_do_not_matter,
    check_policy,
    check_policy_extremes,
)

MODULE = "ppo_policy_loss.triton"
FUNCTION, KERNEL = "ppo_policy_loss_kernel", "ppo_policy_loss"

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
        check_policy,
        kernel=KERNEL,
    ),
    Mutant(
        "common.triton",
        "bounded_exp",
        "the ratio's exponent is not bounded",
        "tl.exp(bounded)",
        "tl.exp(x)",
        check_policy_extremes,
        kernel=KERNEL,
    ),
    Mutant(
        MODULE,
        FUNCTION,
        "clipped tokens keep their gradient",
        "clipped | dual",
        "dual",
        check_policy,
        kernel=KERNEL,
    ),
    Mutant(
        MODULE,
        FUNCTION,
        "no dual clip",
        "advantage < 0.0",
        "advantage < -1e9",
        check_policy,
        {"dual": 1.5},
        kernel=KERNEL,
    ),
    Mutant(
        MODULE,
        "kl_to_reference",
        "k3's own gradient instead of k2's",
        "RAW",
        "True",
        check_policy,
        kernel=KERNEL,
    ),
    Mutant(
        MODULE,
        FUNCTION,
        "the mean is not subtracted",
        "advantage - mean",
        "advantage",
        check_policy,
        kernel=KERNEL,
    ),
    Mutant(
        "common.triton",
        "fold_statistics_kernel",
        "only the first rows of statistics are added",
        "row < programs",
        "row < 1",
        check_policy,
        kernel="fold_statistics",
    ),
)
