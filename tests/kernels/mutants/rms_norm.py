"""Mutants of rms_norm and add_rms_norm."""

from icegrt.kernels import add_rms_norm
from tests.kernels.mutants.mutation import Mutant
from tests.kernels.triton.test_rms_norm import (
    check_buffers,
    check_few_programs,
    check_long_rows,
    check_norm,
    check_views,
)

MODULE = "rms_norm.triton"
FORWARD, BACKWARD = "rms_norm_forward_kernel", "rms_norm_backward_kernel"

MUTANTS = (
    Mutant(
        MODULE,
        FORWARD,
        "eps is left out",
        "squares / width + eps",
        "squares / width",
        check_norm,
        {"rows": 40, "width": 1},
    ),
    Mutant(
        MODULE,
        FORWARD,
        "the mean counts the padding of a row",
        "squares / width",
        "squares / BLOCK",
        check_norm,
    ),
    Mutant(
        MODULE,
        FORWARD,
        "the residual is left out",
        "total += load_rows(residual_ptr, start, column, inside)",
        "pass",
        check_norm,
        {"op": add_rms_norm},
    ),
    Mutant(
        MODULE,
        FORWARD,
        "rows of a view are taken as neighbours",
        "(row // inner) * outer_stride",
        "(row // inner) * inner * inner_stride",
        check_views,
    ),
    Mutant(
        MODULE,
        FORWARD,
        "rows of a strided result are written as neighbours",
        "(row // out_inner) * out_outer_stride",
        "(row // out_inner) * out_inner * out_inner_stride",
        check_buffers,
    ),
    Mutant(
        MODULE,
        FORWARD,
        "a long row reads its sum where the norm was written",
        "total = load_rows(sum_ptr, start, column, inside)",
        "total = load_rows(out_ptr, start, column, inside)",
        check_buffers,
    ),
    Mutant(
        MODULE,
        BACKWARD,
        "the gradient ignores that the scale depends on the row",
        "grad * weight[None, :] - normed * mean",
        "grad * weight[None, :]",
        check_norm,
    ),
    Mutant(
        MODULE,
        BACKWARD,
        "the gradient of the sum is left out",
        "grad_x += load_rows(grad_sum_ptr, start, column, inside)",
        "pass",
        check_norm,
        {"op": add_rms_norm},
    ),
    Mutant(
        MODULE,
        BACKWARD,
        "the weight's gradient keeps the last tile only",
        "part += addend",
        "part = addend",
        check_few_programs,
    ),
    Mutant(
        MODULE,
        BACKWARD,
        "the weight's gradient misses the scale",
        "addend = tl.sum(grad * normed, axis=0)",
        "addend = tl.sum(grad, axis=0)",
        check_norm,
    ),
    Mutant(
        MODULE,
        BACKWARD,
        "the weight's gradient of a long row keeps the last tile only",
        "number >= tl.num_programs(0)",
        "number < 0",
        check_long_rows,
    ),
    Mutant(
        MODULE,
        BACKWARD,
        "a long row takes the mean of its last chunk",
        "products += tl.sum(grad * weight[None, :] * normed, axis=1)",
        "products = tl.sum(grad * weight[None, :] * normed, axis=1)",
        check_long_rows,
    ),
    Mutant(
        MODULE,
        FORWARD,
        "a long row takes the squares of its last chunk",
        "squares += tl.sum(total * total, axis=1)",
        "squares = tl.sum(total * total, axis=1)",
        check_long_rows,
    ),
    Mutant(
        MODULE,
        BACKWARD,
        "rows of a view are taken as neighbours",
        "(row // inner) * outer_stride",
        "(row // inner) * inner * inner_stride",
        check_views,
    ),
)
