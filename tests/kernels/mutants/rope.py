"""Mutants of rope and rope_qkv."""

from icegrt.kernels import rope_qkv
from tests.kernels.mutants.mutation import Mutant
from tests.kernels.triton.test_rope import check_rope

MODULE = "rope.triton"

MUTANTS = (
    Mutant(
        MODULE,
        "rotate",
        "the angle is negated",
        "low * cos - high * sin",
        "low * cos + high * sin",
        check_rope,
        kernel="rope",
    ),
    Mutant(
        MODULE,
        "rotate",
        "the second half is not turned",
        "high * cos + low * sin",
        "high * cos",
        check_rope,
        kernel="rope",
    ),
    Mutant(
        MODULE, "rope_kernel", "the gradient is turned forward again", "sin = -sin", "pass", check_rope, kernel="rope"
    ),
    Mutant(
        MODULE,
        "rope_kernel",
        "all groups take the values of the first",
        "group * v_stride_g",
        "0 * v_stride_g",
        check_rope,
        {"op": rope_qkv},
        kernel="rope",
    ),
    Mutant(
        MODULE,
        "rope_kernel",
        "keys are written where the first query is",
        "k_out_ptr + t * k_out_stride_t",
        "q_out_ptr + t * k_out_stride_t",
        check_rope,
        kernel="rope",
    ),
    Mutant(
        MODULE,
        "rope_kernel",
        "the second half of a value is lost",
        "tl.store(to + half, tl.load(source + half, mask=inside, other=0.0), mask=inside)",
        "pass",
        check_rope,
        {"op": rope_qkv},
        kernel="rope",
    ),
)
