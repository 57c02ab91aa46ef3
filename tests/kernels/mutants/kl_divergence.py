"""Mutants of kl_divergence and of the exponentials of common.triton that k3 is made of."""

from tests.kernels.mutants.mutation import Mutant
from tests.kernels.triton.test_kl_divergence import check_kl

MODULE = "kl_divergence.triton"

MUTANTS = (
    Mutant(
        "common.triton",
        "bounded_exp",
        "k3 overflows",
        "tl.where(x > LIMIT, LIMIT, x)",
        "x",
        check_kl,
        kernel="kl_forward_kernel",
    ),
    Mutant(
        "common.triton",
        "exp_minus_tangent",
        "k3 cancels near 0",
        "tl.where(tl.abs(x) < 0.5, x * x * series, bounded_exp(x, LIMIT) - 1.0 - x)",
        "bounded_exp(x, LIMIT) - 1.0 - x",
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
