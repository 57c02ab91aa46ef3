"""shaped_gae on CPU threads: prepares arrays for the C++ routine (csrc/shaped_gae.hpp), which does all in one pass.

Unlike the reference, it walks each sequence once, from its end, and writes nothing but the results. Streams in another
dtype than fp32 or fp64 are widened first; contiguous ones of that dtype are read in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from icegrt import _C

from ..common.streams import mask_bytes
from ..dispatch import log_launch
from ..stats import Moments
from ..types import ShapedGAE
from ..validate import wide_dtype
from .inputs import GAECoefficients, GAEInputs

# Legend: A, entries of the action stream; N, sequences.


@torch.no_grad()
def shaped_gae(inputs: GAEInputs, coefficients: GAECoefficients) -> ShapedGAE:
    """Return rewards, advantages and returns; see the public function."""
    dtype = wide_dtype(inputs.score_N, inputs.value_A, inputs.logprob_A, inputs.ref_logprob_A, inputs.token_reward_A)

    def array(x: float | Tensor | None) -> Any:
        return x.detach().to(dtype).contiguous().numpy() if isinstance(x, Tensor) else x

    # 1. Outputs are allocated here and written in place: arrays share the memory of their tensors.
    advantage_A, return_A, reward_A = torch.empty(3, inputs.value_A.shape[0], dtype=dtype)
    kl_N = torch.empty(inputs.score_N.shape, dtype=dtype)
    value_mask_A = torch.empty(inputs.value_A.shape, dtype=torch.bool) if coefficients.by_turn else None
    # 2. One routine for each dtype. The threads are torch's: the result has the same bits on any number of them.
    run = _C.shaped_gae_float64 if dtype == torch.float64 else _C.shaped_gae_float32
    log_launch("shaped_gae", "cpp")
    moments = run(
        array(inputs.score_N),
        array(inputs.value_A),
        array(inputs.logprob_A),
        array(inputs.ref_logprob_A),
        inputs.cu_actions.to(torch.int64).contiguous().numpy(),
        array(inputs.bootstrap_N),
        None if inputs.mask_A is None else mask_bytes(inputs.mask_A).numpy(),
        array(inputs.token_reward_A),
        advantage_A.numpy(),
        return_A.numpy(),
        reward_A.numpy(),
        kl_N.numpy(),
        None if value_mask_A is None else value_mask_A.view(torch.uint8).numpy(),
        coefficients.kl_estimator,
        float(coefficients.kl_coef),
        coefficients.gamma,
        array(coefficients.lam),
        array(coefficients.lam_value),
        torch.get_num_threads(),
    )
    count, mean, m2 = torch.tensor(moments, dtype=torch.float64).unbind()
    return ShapedGAE(advantage_A, return_A, reward_A, kl_N, Moments(count, mean, m2), value_mask_A)
