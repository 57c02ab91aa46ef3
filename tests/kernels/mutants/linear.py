"""Mutants of the linear operations and of the part of token_logprobs that they alone launch."""

from tests.kernels.mutants.mutation import Mutant
from tests.kernels.triton.test_linear import check_loss

MUTANTS = (
    Mutant(
        "token_logprobs.triton",
        "token_logprobs_backward",
        "compacted rows are read at their new place",
        "COMPACT",
        "False",
        check_loss,
        {"masked": False, "clip_low": 0.01, "clip_high": 0.01},
    ),
    Mutant(
        "linear.triton",
        "logits_grad",
        "the shift of the labels is forgotten in the gradient",
        "_columns(z, head)",
        "Columns(_columns(z, head).start + 1, z.shape[1], head.temperature)",
        check_loss,
        kernel="linear_ppo_loss",
    ),
)
