"""masked_moments and whiten in Triton: one launch each, no atomics in the sums, nothing read back by the host.

Moments: every program reduces one block to (count, mean, M2) in fp64, and the program that finishes last merges all of
them in their order. Which program that is does not change what it adds up, so the bits repeat.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import log_launch
from ..types import Moments
from ..validate import single_backward

BLOCK = 4096
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def finish_moments(count, mean, m2, partial_ptr, moments_ptr, done_ptr, tile, tiles):
    """Stores the moments of this program; the last of `tiles` programs to come here merges all, in order."""
    tl.store(partial_ptr + tile, count)
    tl.store(partial_ptr + tiles + tile, mean)
    tl.store(partial_ptr + 2 * tiles + tile, m2)
    tl.debug_barrier()
    finished = tl.atomic_add(done_ptr, 1, sem="acq_rel")
    if finished == tiles - 1:
        tl.debug_barrier()
        WIDTH: tl.constexpr = 256
        lane = tl.arange(0, WIDTH)
        counts = tl.zeros((WIDTH,), tl.float64)
        sums = tl.zeros((WIDTH,), tl.float64)
        for start in range(0, tiles, WIDTH):
            here = start + lane < tiles
            n = tl.load(partial_ptr + start + lane, mask=here, other=0.0, cache_modifier=".cg")
            counts += n
            sums += n * tl.load(partial_ptr + tiles + start + lane, mask=here, other=0.0, cache_modifier=".cg")
        total = tl.sum(counts, axis=0)
        whole_mean = tl.sum(sums, axis=0) / tl.maximum(total, 1.0)
        squares = tl.zeros((WIDTH,), tl.float64)
        for start in range(0, tiles, WIDTH):
            here = start + lane < tiles
            n = tl.load(partial_ptr + start + lane, mask=here, other=0.0, cache_modifier=".cg")
            off = tl.load(partial_ptr + tiles + start + lane, mask=here, other=0.0, cache_modifier=".cg") - whole_mean
            squares += tl.load(partial_ptr + 2 * tiles + start + lane, mask=here, other=0.0, cache_modifier=".cg")
            squares += n * off * off
        tl.store(moments_ptr, total)
        tl.store(moments_ptr + 1, whole_mean)
        tl.store(moments_ptr + 2, tl.sum(squares, axis=0))


@triton.jit(do_not_specialize=["tiles", "mask_size"])
def masked_moments_kernel(
    x_ptr, mask_ptr, partial_ptr, moments_ptr, done_ptr, size, tiles, mask_size, BLOCK: tl.constexpr
):
    tile = tl.program_id(0)
    at = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = at < size
    keep = keep & (tl.load(mask_ptr + at, mask=keep & (at < mask_size), other=1) != 0)
    x = tl.load(x_ptr + at, mask=keep, other=0.0).to(tl.float64)
    count = tl.sum(keep.to(tl.float64), axis=0)
    mean = tl.sum(x, axis=0) / tl.maximum(count, 1.0)
    off = tl.where(keep, x - mean, 0.0)
    finish_moments(count, mean, tl.sum(off * off, axis=0), partial_ptr, moments_ptr, done_ptr, tile, tiles)


@triton.jit
def whiten_kernel(x_ptr, count_ptr, mean_ptr, m2_ptr, out_ptr, size, eps, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """MODE: shift subtracts the mean, keep leaves it in, gradient is the derivative of either."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    variance = tl.load(m2_ptr) / tl.maximum(tl.load(count_ptr), 1.0)
    scale = (1.0 / tl.sqrt(variance + eps)).to(tl.float32)
    mean = tl.load(mean_ptr).to(tl.float32)
    x = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
    if MODE == "gradient":
        out = x * scale
    elif MODE == "shift":
        out = (x - mean) * scale
    else:
        out = (x - mean) * scale + mean
    tl.store(out_ptr + at, out, mask=here)


def masked_moments(x: Tensor, mask: Tensor | None, group) -> Moments:
    x = x.contiguous()
    keep = x if mask is None else (mask if mask.dtype == torch.bool else mask != 0).contiguous()
    tiles = max(1, triton.cdiv(x.numel(), BLOCK))
    moments = torch.empty(3 + 3 * tiles, dtype=torch.float64, device=x.device)
    done = torch.zeros(1, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        log_launch("masked_moments_kernel", "triton")
        masked_moments_kernel[(tiles,)](
            x,
            keep.view(torch.uint8) if mask is not None else x,
            moments[3:],
            moments,
            done,
            x.numel(),
            tiles,
            0 if mask is None else x.numel(),
            BLOCK=BLOCK,
            **OPTIONS,
        )
    mine = Moments(*moments[:3].unbind())
    return mine if group is None else mine.reduce(group)


class _Whiten(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, moments, shift_mean, eps):
        ctx.moments, ctx.eps, ctx.dtype = moments, eps, x.dtype
        return _launch_whiten(x, moments, eps, "shift" if shift_mean else "keep", torch.float32)

    @staticmethod
    def backward(ctx, grad):
        single_backward("whiten")
        return _launch_whiten(grad, ctx.moments, ctx.eps, "gradient", ctx.dtype), None, None, None


def _launch_whiten(x: Tensor, moments: Moments, eps: float, mode: str, dtype: torch.dtype) -> Tensor:
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    statistics = [m.to(torch.float64) for m in (moments.count, moments.mean, moments.m2)]
    if x.numel():
        with torch.cuda.device_of(x):
            log_launch("whiten_kernel", "triton")
            whiten_kernel[(triton.cdiv(x.numel(), BLOCK),)](
                x, *statistics, out, x.numel(), eps, MODE=mode, BLOCK=BLOCK, **OPTIONS
            )
    return out


def whiten(x: Tensor, moments: Moments, *, shift_mean: bool, eps: float) -> Tensor:
    return _Whiten.apply(x, moments, shift_mean, eps)
