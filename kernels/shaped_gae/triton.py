"""shaped_gae in Triton: buffers, the launch and its cost. One launch; triton_kernel.py has the kernel."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..common.operators import Cost, device_operator
from ..common.streams import mask_bytes
from ..common.triton import value_and_pointer
from ..dispatch import log_launch
from ..kl_divergence.reference import EXPONENT_LIMIT, LOGPROB_FLOOR
from ..stats import Moments
from ..types import ShapedGAE
from ..validate import KL_ESTIMATORS
from .inputs import GAECoefficients, GAEInputs
from .triton_kernel import shaped_gae_kernel

# Legend
#   N  sequences                    A  entries of the stream, slack behind the last sequence included
#   tile  [ROWS, CHUNK] entries of one program: a row is a chunk, lanes run backwards in time
#   slots  places for chunks, tiles * ROWS of them; some stay empty
#   maps  [6, slots] fp32: a, b, c, e, d of each chunk, and its KL; with two recursions [9, slots]: f, g, h too
#   sync  [2 + tiles] int32: the next ticket, finished programs, and a flag for each published tile
#   *_size  extent of an optional input: A, N or 1, or 0 if it is absent

ROWS, CHUNK = 8, 128
# Chunks that one step of the look-back reads, and sequences that one step of the search compares.
LOOKBACK, FANOUT = 64, 64
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
# Operations per entry, for the declared cost: reward, its map, seven steps of a scan of maps, and the moments.
FLOPS = 90


@torch.no_grad()
def shaped_gae(inputs: GAEInputs, coefficients: GAECoefficients) -> ShapedGAE:
    """Return rewards, advantages and returns; see the public function."""
    N, A, device = inputs.score_N.shape[0], inputs.value_A.shape[0], inputs.value_A.device

    def stream(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(torch.float32).contiguous()

    # 1. The grid: the last slot that a sequence or the slack can reach, rounded up to tiles of ROWS.
    tiles = triton.cdiv(A // CHUNK + N + 1, ROWS)
    # 2. Buffers. Only the tickets and flags need zeros: everything else is written before it is read.
    advantage_A, return_A, reward_A = torch.empty(3, A, dtype=torch.float32, device=device)
    kl_N = torch.empty(N, dtype=torch.float32, device=device)
    own_lam_value = coefficients.lam_value
    decoupled = own_lam_value is not None
    value_mask_A = torch.empty(A, dtype=torch.bool, device=device) if coefficients.by_turn else None
    maps = torch.empty((9 if decoupled else 6) * tiles * ROWS, dtype=torch.float32, device=device)
    moments = torch.empty(3 + 3 * tiles, dtype=torch.float64, device=device)
    sync = torch.zeros(2 + tiles, dtype=torch.int32, device=device)
    # 3. A coefficient on the device is passed by pointer, so that the host does not wait for it. So are lambdas.
    kl_coef, kl_coef_ptr = value_and_pointer(coefficients.kl_coef)
    lam, lam_N = value_and_pointer(coefficients.lam)
    lam_value, lam_value_N = value_and_pointer(coefficients.lam if own_lam_value is None else own_lam_value)
    _gae_step(
        stream(inputs.score_N),
        stream(inputs.value_A),
        stream(inputs.logprob_A),
        stream(inputs.ref_logprob_A),
        inputs.cu_actions.to(torch.int32).contiguous(),
        stream(inputs.bootstrap_N),
        None if inputs.mask_A is None else mask_bytes(inputs.mask_A),
        stream(inputs.token_reward_A),
        stream(kl_coef_ptr),
        stream(lam_N),
        stream(lam_value_N) if decoupled else None,
        advantage_A,
        return_A,
        reward_A,
        kl_N,
        None if value_mask_A is None else value_mask_A.view(torch.uint8),
        maps,
        moments,
        sync,
        kl_coef,
        coefficients.gamma,
        lam,
        lam_value,
        decoupled,
        KL_ESTIMATORS.index(coefficients.kl_estimator),
    )
    return ShapedGAE(advantage_A, return_A, reward_A, kl_N, Moments(*moments[:3].unbind()), value_mask_A)


def _gae_cost(
    score_N: Tensor,
    value_A: Tensor,
    logprob_A: Tensor | None,
    ref_logprob_A: Tensor | None,
    cu_actions: Tensor,
    *others: Any,
) -> Cost:
    optional, (*writes, maps, moments, sync) = others[:6], others[6:14]
    reads = [score_N, value_A, cu_actions, *optional]
    # Log-probs are read where there is a reference alone.
    reads += [] if ref_logprob_A is None else [logprob_A, ref_logprob_A]
    # The moments of tiles and, at most, the maps of chunks are read back.
    reads += [maps, moments[3:], sync]
    return Cost.of_pass(reads, [*writes, maps, moments, sync], FLOPS * value_A.numel())


@device_operator(
    "shaped_gae_kernel(Tensor score, Tensor value, Tensor? logprob, Tensor? ref_logprob, Tensor cu_actions, "
    "Tensor? bootstrap, Tensor? mask, Tensor? token_reward, Tensor? kl_coef_ptr, Tensor? lam_ptr, "
    "Tensor? lam_value_ptr, Tensor(a!) advantage, Tensor(b!) returns, Tensor(c!) reward, Tensor(d!) kl, "
    "Tensor(e!)? value_mask, Tensor(f!) maps, Tensor(g!) moments, Tensor(h!) sync, float kl_coef, float gamma, "
    "float lam, float lam_value, bool decoupled, int estimator)",
    _gae_cost,
)
def _gae_step(
    score_N: Tensor,
    value_A: Tensor,
    logprob_A: Tensor | None,
    ref_logprob_A: Tensor | None,
    cu_actions: Tensor,
    bootstrap_N: Tensor | None,
    mask_A: Tensor | None,
    token_reward_A: Tensor | None,
    kl_coef_ptr: Tensor | None,
    lam_N: Tensor | None,
    lam_value_N: Tensor | None,
    advantage_A: Tensor,
    return_A: Tensor,
    reward_A: Tensor,
    kl_N: Tensor,
    value_mask_A: Tensor | None,
    maps: Tensor,
    moments: Tensor,
    sync: Tensor,
    kl_coef: float,
    gamma: float,
    lam: float,
    lam_value: float,
    decoupled: bool,
    estimator: int,
) -> None:
    # An absent input is never read; the kernel needs some pointer in its place.
    N, A, tiles = score_N.shape[0], value_A.shape[0], sync.numel() - 2

    def pointer(x: Tensor | None) -> Tensor:
        return advantage_A if x is None else x

    def bytes_pointer(x: Tensor | None) -> Tensor:
        return advantage_A.view(torch.uint8) if x is None else x

    def extent(x: Tensor | None) -> int:
        return 0 if x is None else x.numel()

    # The first stride of the search: the largest power of FANOUT up to N.
    search_stride = 1
    while search_stride * FANOUT <= N:
        search_stride *= FANOUT
    with torch.cuda.device_of(value_A):
        log_launch("shaped_gae_kernel", "triton")
        shaped_gae_kernel[(tiles,)](
            score_N,
            value_A,
            pointer(logprob_A),
            pointer(ref_logprob_A),
            cu_actions,
            pointer(bootstrap_N),
            bytes_pointer(mask_A),
            pointer(token_reward_A),
            pointer(kl_coef_ptr),
            pointer(lam_N),
            pointer(lam_value_N),
            advantage_A,
            return_A,
            reward_A,
            kl_N,
            bytes_pointer(value_mask_A),
            maps,
            moments[3:],
            moments,
            sync,
            kl_coef,
            gamma,
            gamma * lam,
            gamma * lam_value,
            N,
            A,
            tiles * ROWS,
            tiles,
            search_stride,
            extent(ref_logprob_A),
            extent(bootstrap_N),
            extent(mask_A),
            extent(token_reward_A),
            extent(kl_coef_ptr),
            extent(lam_N),
            extent(lam_value_N),
            estimator,
            DECOUPLED=decoupled,
            TURNS=value_mask_A is not None,
            LIMIT=EXPONENT_LIMIT,
            FLOOR=LOGPROB_FLOOR,
            ROWS=ROWS,
            CHUNK=CHUNK,
            LOOKBACK=LOOKBACK,
            FANOUT=FANOUT,
            **OPTIONS,
        )
