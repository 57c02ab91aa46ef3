"""rope in Triton: queries, keys and values in one launch, forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.operators import Cost, device_operator
from ..dispatch import log_launch
from .function import Heads, run, run_qkv

# Legend
#   T, G, D   tokens, groups, elements of a head; HALF = D / 2, HALF_BLOCK the next power of two
#   slot      a head of the group: its queries, then keys, then values; a program has one slot of TOKENS tokens
#   *_size    queries, keys and values of a group; 0: there are none
# Head h of group g of token t of a tensor starts at t * stride_t + g * stride_g + h * stride_h.

TILE = 2048  # elements of half a head that a program loads
# No FMA: rope_write_kv, another kernel with the same rotation, could contract it differently.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
FLOPS = 3  # operations per rotated element, for the declared cost


@triton.jit
def rotate(source_ptr, to_ptr, cos, sin, inside, half):
    """Write one rotated tile; pointers are those of the first half of a head."""
    low = tl.load(source_ptr, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source_ptr + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(to_ptr, low * cos - high * sin, mask=inside)
    tl.store(to_ptr + half, high * cos + low * sin, mask=inside)


@triton.jit
def rope_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_out_ptr,
    k_out_ptr,
    v_out_ptr,
    cos_ptr,
    sin_ptr,
    tokens,
    q_size,
    k_size,
    v_size,
    half,
    q_stride_t,
    q_stride_g,
    q_stride_h,
    q_out_stride_t,
    q_out_stride_g,
    q_out_stride_h,
    k_stride_t,
    k_stride_g,
    k_stride_h,
    k_out_stride_t,
    k_out_stride_g,
    k_out_stride_h,
    v_stride_t,
    v_stride_g,
    v_stride_h,
    v_out_stride_t,
    v_out_stride_g,
    v_out_stride_h,
    INVERSE: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    """Rotate, or copy, one head of TOKENS tokens."""
    # 1. The tokens, the head, and its part of the tables.
    t = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    slots = q_size + k_size + v_size
    group, slot = tl.program_id(1) // slots, tl.program_id(1) % slots
    column = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (t < tokens) & (column < half)
    cos = tl.load(cos_ptr + t * half + column, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + t * half + column, mask=inside, other=0.0)
    if INVERSE:
        sin = -sin
    # 2. A query, a key, or a value.
    if slot < q_size:
        source = q_ptr + t * q_stride_t + group * q_stride_g + slot * q_stride_h + column
        to = q_out_ptr + t * q_out_stride_t + group * q_out_stride_g + slot * q_out_stride_h + column
        rotate(source, to, cos, sin, inside, half)
    elif slot < q_size + k_size:
        head = slot - q_size
        source = k_ptr + t * k_stride_t + group * k_stride_g + head * k_stride_h + column
        to = k_out_ptr + t * k_out_stride_t + group * k_out_stride_g + head * k_out_stride_h + column
        rotate(source, to, cos, sin, inside, half)
    else:
        head = slot - q_size - k_size
        source = v_ptr + t * v_stride_t + group * v_stride_g + head * v_stride_h + column
        to = v_out_ptr + t * v_out_stride_t + group * v_out_stride_g + head * v_out_stride_h + column
        tl.store(to, tl.load(source, mask=inside, other=0.0), mask=inside)
        tl.store(to + half, tl.load(source + half, mask=inside, other=0.0), mask=inside)


def _cost(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_out: Tensor,
    k_out: Tensor,
    v_out: Tensor | None,
    cos_TR: Tensor,
    sin_TR: Tensor,
    inverse: bool,
) -> Cost:
    return Cost.of_pass([q, k, v, cos_TR, sin_TR], [q_out, k_out, v_out], FLOPS * (q.numel() + k.numel()))


@device_operator(
    "rope(Tensor q, Tensor k, Tensor? v, Tensor(a!) q_out, Tensor(b!) k_out, Tensor(c!)? v_out, Tensor cos, "
    "Tensor sin, bool inverse)",
    _cost,
)
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    q_out: Tensor,
    k_out: Tensor,
    v_out: Tensor | None,
    cos_TR: Tensor,
    sin_TR: Tensor,
    inverse: bool,
) -> None:
    tokens, groups = q.shape[:2]
    half = cos_TR.shape[1]
    block = triton.next_power_of_2(half)
    rows = max(1, TILE // block)
    # Absent values are never read: they have no slots.
    pairs = ((q, q_out), (k, k_out), (k, k_out) if v is None or v_out is None else (v, v_out))
    sizes = (q.shape[2], k.shape[2], 0 if v is None else v.shape[2])
    with torch.cuda.device_of(q):
        log_launch("rope", "triton")
        rope_kernel[(triton.cdiv(tokens, rows), groups * sum(sizes))](
            *(source for source, _ in pairs),
            *(out for _, out in pairs),
            cos_TR,
            sin_TR,
            tokens,
            *sizes,
            half,
            *(stride for source, out in pairs for stride in (*source.stride()[:3], *out.stride()[:3])),
            INVERSE=inverse,
            TOKENS=rows,
            HALF_BLOCK=block,
            **OPTIONS,
        )


def _step(source: Heads, to: Heads, cos_TR: Tensor, sin_TR: Tensor, inverse: bool) -> None:
    _operator(*source, *to, cos_TR, sin_TR, inverse)


def rope(q_TND: Tensor, k_TGD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor]:
    """Return rotated queries and keys; see the public function."""
    return run(_step, q_TND, k_TGD, cos_TR, sin_TR)


def rope_qkv(qkv_TGMD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries and keys, and values; see the public function."""
    return run_qkv(_step, qkv_TGMD, cos_TR, sin_TR)
