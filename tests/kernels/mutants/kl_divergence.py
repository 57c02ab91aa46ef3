"""Mutants of kl_divergence."""

from tests.kernels.mutants.mutation import Mutant
from tests.kernels.triton.test_kl_divergence import check_kl

MODULE = "kl_divergence.triton"

MUTANTS = (
    Mutant(
        MODULE,
        "estimate",
        "k3 overflows",
        "tl.minimum(x, LIMIT)",
        "x",
        check_kl,
        kernel="kl_forward_kernel",
    ),
    Mutant(
        MODULE,
        "estimate",
        "k3 cancels near 0",
        "tl.where(tl.abs(x) < 0.5, x * x * series, plain)",
        "plain",
        check_kl,
        kernel="kl_forward_kernel",
    ),
    Mutant(
        MODULE,
        "kl_backward_kernel",
        "the reference's gradient has the sign of the policy's",
        "-grad",
        "grad",
        check_kl,
    ),
)
