"""The extension's functions. Arrays are contiguous numpy arrays of int64, unless another dtype is named."""

from typing import Any

import numpy as np

def pack(
    prompt_tokens: np.ndarray,
    prompt_offsets: np.ndarray,
    response_tokens: np.ndarray,
    response_offsets: np.ndarray,
    mask_offsets: np.ndarray | None,
    tail_multiple: int,
    tail_token: int,
) -> dict[str, Any]: ...
def balance(
    lengths: np.ndarray, costs: np.ndarray | None, token_budget: int, ranks: int, round_to: int
) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]: ...

# Floats are of the dtype in the name; the mask is uint8.
def shaped_gae_float32(
    score_N: np.ndarray,
    value_A: np.ndarray,
    logprob_A: np.ndarray,
    ref_logprob_A: np.ndarray | None,
    cu_actions: np.ndarray,
    bootstrap_N: np.ndarray | None,
    mask_A: np.ndarray | None,
    token_reward_A: np.ndarray | None,
    advantage_A: np.ndarray,
    return_A: np.ndarray,
    reward_A: np.ndarray,
    kl_N: np.ndarray,
    kl_estimator: str,
    kl_coef: float,
    gamma: float,
    lam: float,
    threads: int,
) -> tuple[float, float, float]: ...

shaped_gae_float64 = shaped_gae_float32
