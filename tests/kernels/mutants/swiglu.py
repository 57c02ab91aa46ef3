"""Mutants of swiglu."""

from tests.kernels.mutants.mutation import Mutant
from tests.kernels.triton.test_swiglu import check_swiglu

MODULE = "swiglu.triton"
FORWARD, BACKWARD = "swiglu_forward_kernel", "swiglu_backward_kernel"

MUTANTS = (
    Mutant(
        MODULE,
        FORWARD,
        "gate and up are exchanged",
        "gate * (1.0 / (1.0 + tl.exp(-gate))) * up",
        "up * (1.0 / (1.0 + tl.exp(-up))) * gate",
        check_swiglu,
    ),
    Mutant(
        MODULE,
        FORWARD,
        "the second program of a row repeats the first",
        "tl.program_id(1) * BLOCK",
        "0 * BLOCK",
        check_swiglu,
    ),
    Mutant(
        MODULE,
        BACKWARD,
        "the slope of the sigmoid is left out",
        "1.0 + gate * (1.0 - sigmoid)",
        "1.0",
        check_swiglu,
    ),
    Mutant(
        MODULE, BACKWARD, "the gradient of up misses the sigmoid", "grad * gate * sigmoid", "grad * gate", check_swiglu
    ),
    Mutant(
        MODULE,
        BACKWARD,
        "the upstream gradient is 1",
        "tl.load(grad_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)",
        "1.0",
        check_swiglu,
    ),
)
