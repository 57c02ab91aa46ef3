"""shaped_gae on CPU threads: prepares arrays for the C++ routine (csrc/shaped_gae.hpp), which does all in one pass.

Departing from the reference: sequences are walked once, from their ends, and nothing but the results is written.
Streams in another dtype than fp32 or fp64 are widened first; contiguous ones of that dtype are read in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from icegrt import _C

from ..dispatch import log_launch
from ..types import Moments, ShapedGAE
from ..validate import wide_dtype


@torch.no_grad()
def shaped_gae(
    score_N: Tensor,
    value_A: Tensor,
    logprob_A: Tensor,
    ref_logprob_A: Tensor | None,
    cu_actions: Tensor,
    *,
    kl_coef,
    kl_estimator: str,
    gamma: float,
    lam: float,
    bootstrap_N: Tensor | None,
    mask_A: Tensor | None,
    token_reward_A: Tensor | None,
) -> ShapedGAE:
    dtype = wide_dtype(score_N, value_A, logprob_A, ref_logprob_A, token_reward_A)

    def stream(x: Tensor | None):
        return None if x is None else x.detach().to(dtype).contiguous().numpy()

    advantage_A, return_A, reward_A = torch.empty(3, value_A.shape[0], dtype=dtype)
    kl_N = torch.empty(score_N.shape, dtype=dtype)
    keep_A = None
    if mask_A is not None:
        keep_A = (mask_A if mask_A.dtype == torch.bool else mask_A != 0).contiguous().view(torch.uint8).numpy()
    run = _C.shaped_gae_float64 if dtype == torch.float64 else _C.shaped_gae_float32
    log_launch("shaped_gae", "cpp")
    moments = run(
        stream(score_N),
        stream(value_A),
        stream(logprob_A),
        stream(ref_logprob_A),
        cu_actions.to(torch.int64).contiguous().numpy(),
        stream(bootstrap_N),
        keep_A,
        stream(token_reward_A),
        advantage_A.numpy(),
        return_A.numpy(),
        reward_A.numpy(),
        kl_N.numpy(),
        kl_estimator,
        float(kl_coef),
        gamma,
        lam,
        torch.get_num_threads(),
    )
    count, mean, m2 = torch.tensor(moments, dtype=torch.float64).unbind()
    return ShapedGAE(advantage_A, return_A, reward_A, kl_N, Moments(count, mean, m2))
