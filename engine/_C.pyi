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
    share_prompts: bool,
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
    value_mask_A: np.ndarray | None,
    kl_estimator: str,
    kl_coef: float,
    gamma: float,
    lam: float | np.ndarray,
    lam_value: float | np.ndarray | None,
    threads: int,
) -> tuple[float, float, float]: ...

shaped_gae_float64 = shaped_gae_float32

# The operations of the trunk take the dtype's name, and addresses of contiguous memory or of the first head or row;
# 0 is an absent tensor. `rows` are the number of rows, their width, and how they lie; `out_strides`, how
# the rows of the result lie (see csrc/rms_norm.hpp).
def rms_norm_forward(
    dtype: str,
    rows: tuple[int, int, int, int, int],
    out_strides: tuple[int, int, int],
    x: int,
    residual: int,
    weight: int,
    out: int,
    total: int,
    scale: int,
    eps: float,
    threads: int,
    /,
) -> None: ...
def rms_norm_backward(
    dtype: str,
    rows: tuple[int, int, int, int, int],
    grad: int,
    grad_total: int,
    total: int,
    weight: int,
    scale: int,
    grad_x: int,
    grad_weight: int,
    threads: int,
    /,
) -> None: ...
def write_kv(
    element_bytes: int,
    tensors: tuple[int, int, int, int],
    strides: tuple[int, ...],
    pages: tuple[int, ...],
    slots: int,
    rows: int,
    threads: int,
    /,
) -> None: ...
def copy_blocks(
    cache: int,
    parts: int,
    blocks: int,
    sizes: tuple[int, int, int],
    copy_from: int,
    copy_to: int,
    copies: int,
    threads: int,
    /,
) -> None: ...

# dtype may be "float16" too.
def paged_attention(
    dtype: str,
    tensors: tuple[int, ...],
    strides: tuple[int, ...],
    sizes: tuple[int, ...],
    scale: float,
    max_length: int,
    threads: int,
    /,
) -> None: ...
def rope(
    dtype: str,
    source: tuple[int, ...],
    to: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    cos: int,
    sin: int,
    tokens: int,
    groups: int,
    half: int,
    inverse: bool,
    threads: int,
    /,
) -> None: ...
def rope_write_kv(
    dtype: str,
    source: tuple[int, ...],
    to: tuple[int, ...],
    strides: tuple[int, ...],
    sizes: tuple[int, ...],
    cos: int,
    sin: int,
    slots: int,
    threads: int,
    /,
) -> None: ...
def linear_rows(
    dtype: str, wide_out: bool, tensors: tuple[int, ...], sizes: tuple[int, ...], threads: int, /
) -> None: ...
def sample_tokens(
    dtype: str,
    tensors: tuple[int, ...],
    sizes: tuple[int, ...],
    numbers: tuple[float, float, float],
    integers: tuple[int, int],
    threads: int,
    /,
) -> None: ...
def packed_attention(
    dtype: str,
    tensors: tuple[int, ...],
    strides: tuple[int, ...],
    lengths: tuple[int, int],
    sizes: tuple[int, ...],
    scale: float,
    threads: int,
    /,
) -> None: ...
def swiglu_forward(dtype: str, gate_up: int, out: int, rows: int, width: int, threads: int, /) -> None: ...
def swiglu_backward(
    dtype: str, gate_up: int, grad: int, grad_gate_up: int, rows: int, width: int, threads: int, /
) -> None: ...
def logit_statistics(
    dtype: str,
    logits: int,
    labels: int,
    start: int,
    statistics: int,
    rows: int,
    columns: int,
    temperature: float,
    threads: int,
    /,
) -> None: ...
def logit_gradients(
    dtype: str,
    logits: int,
    sources: int,
    labels: int,
    start: int,
    of_rows: tuple[int, ...],
    count: int,
    columns: int,
    temperature: float,
    threads: int,
    /,
) -> None: ...

class BlockScheduler:
    """Tokens and counts are int32, ids int64; see csrc/scheduler.hpp."""

    def __init__(
        self,
        n_blocks: int,
        block_size: int,
        max_sequences: int,
        max_length: int,
        token_budget: int,
        longest_first: bool,
        reuse_prefixes: bool,
    ) -> None: ...
    def submit(self, ids: list[int], prompt: np.ndarray, max_new_tokens: int) -> None: ...
    def plan(self) -> dict[str, Any]: ...
    def complete(self, token_N: np.ndarray, finished_N: np.ndarray) -> int: ...
    def abort(self, sequence_id: int) -> None: ...
    def resume(self, sequence_id: int) -> None: ...
    def remove(self, sequence_id: int) -> None: ...
    def forget_cache(self) -> None: ...
    def check_invariants(self) -> None: ...
    def tokens(self, sequence_id: int) -> np.ndarray: ...
    def is_finished(self, sequence_id: int) -> bool: ...
    def stats(self) -> dict[str, int]: ...
    @property
    def block_table(self) -> np.ndarray: ...
    @property
    def n_running(self) -> int: ...
    @property
    def n_waiting(self) -> int: ...
    @property
    def n_in_flight(self) -> int: ...
    @property
    def blocks_available(self) -> int: ...
    @property
    def blocks_reusable(self) -> int: ...
