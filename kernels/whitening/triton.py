"""masked_moments and whiten in Triton: one launch each, no atomics in the sums, nothing read back by the host.

Every program of masked_moments reduces one block to (count, mean, M2) in fp64. The program that finishes last merges
all of them in order. The order does not depend on which program that is, so the bits repeat.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from ..common.operators import Cost, device_operator
from ..common.streams import mask_bytes
from ..dispatch import log_launch
from ..stats import Moments
from ..validate import single_backward

# Legend
#   x, mask   any shape; kernels see them flat, in blocks of BLOCK entries
#   tile      number of a program; tiles: how many there are
#   partial   [3, tiles] fp64: count, mean and M2 of each program
#   moments   [3] fp64: count, mean and M2 of all
#   done      [1] int32: programs that have stored their partial

BLOCK = 4096
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def finish_moments(count, mean, m2, partial_ptr, moments_ptr, done_ptr, tile, tiles):
    """Store the moments of this program; the last of `tiles` programs merges all, in order."""
    # 1. Publish. The barrier puts every thread's store before the release of the counter.
    tl.store(partial_ptr + tile, count)
    tl.store(partial_ptr + tiles + tile, mean)
    tl.store(partial_ptr + 2 * tiles + tile, m2)
    tl.debug_barrier()
    finished = tl.atomic_add(done_ptr, 1, sem="acq_rel")
    if finished == tiles - 1:
        # All other programs have published: none waits for another, so no order of launch can deadlock.
        tl.debug_barrier()
        WIDTH: tl.constexpr = 256
        lane = tl.arange(0, WIDTH)
        counts = tl.zeros((WIDTH,), tl.float64)
        sums = tl.zeros((WIDTH,), tl.float64)
        # 2. Mean over all programs. ".cg" skips the first-level cache, which is not coherent between programs.
        for start in range(0, tiles, WIDTH):
            inside = start + lane < tiles
            n = tl.load(partial_ptr + start + lane, mask=inside, other=0.0, cache_modifier=".cg")
            counts += n
            sums += n * tl.load(partial_ptr + tiles + start + lane, mask=inside, other=0.0, cache_modifier=".cg")
        total = tl.sum(counts, axis=0)
        mean_all = tl.sum(sums, axis=0) / tl.maximum(total, 1.0)
        # 3. M2 of all: that of each program, and its distance from the common mean.
        squares = tl.zeros((WIDTH,), tl.float64)
        for start in range(0, tiles, WIDTH):
            inside = start + lane < tiles
            n = tl.load(partial_ptr + start + lane, mask=inside, other=0.0, cache_modifier=".cg")
            delta = tl.load(partial_ptr + tiles + start + lane, mask=inside, other=0.0, cache_modifier=".cg") - mean_all
            squares += tl.load(partial_ptr + 2 * tiles + start + lane, mask=inside, other=0.0, cache_modifier=".cg")
            squares += n * delta * delta
        tl.store(moments_ptr, total)
        tl.store(moments_ptr + 1, mean_all)
        tl.store(moments_ptr + 2, tl.sum(squares, axis=0))


# Sizes that differ from call to call are not specialised: 1 and multiples of 16 would each compile another binary.
@triton.jit(do_not_specialize=["tiles", "mask_size"])
def masked_moments_kernel(
    x_ptr, mask_ptr, partial_ptr, moments_ptr, done_ptr, size, tiles, mask_size, BLOCK: tl.constexpr
):
    """Reduce one block to its moments, and merge all blocks in the last program."""
    # 1. Load. Without a mask mask_size is 0 and every entry within size counts.
    tile = tl.program_id(0)
    offsets = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = offsets < size
    keep = keep & (tl.load(mask_ptr + offsets, mask=keep & (offsets < mask_size), other=1) != 0)
    x = tl.load(x_ptr + offsets, mask=keep, other=0.0).to(tl.float64)
    # 2. Two passes over registers: mean first, then deviations from it.
    count = tl.sum(keep.to(tl.float64), axis=0)
    mean = tl.sum(x, axis=0) / tl.maximum(count, 1.0)
    delta = tl.where(keep, x - mean, 0.0)
    # 3. Merge.
    finish_moments(count, mean, tl.sum(delta * delta, axis=0), partial_ptr, moments_ptr, done_ptr, tile, tiles)


@triton.jit
def whiten_kernel(x_ptr, count_ptr, mean_ptr, m2_ptr, out_ptr, size, eps, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """Whiten BLOCK entries. MODE: "shift" subtracts the mean, "keep" leaves it in, "gradient" is the derivative."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    # Every program reads the moments itself, so that the host never waits for them.
    variance = tl.load(m2_ptr) / tl.maximum(tl.load(count_ptr), 1.0)
    scale = (1.0 / tl.sqrt(variance + eps)).to(tl.float32)
    mean = tl.load(mean_ptr).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if MODE == "gradient":
        out = x * scale
    elif MODE == "shift":
        out = (x - mean) * scale
    else:
        out = (x - mean) * scale + mean
    tl.store(out_ptr + offsets, out, mask=inside)


def masked_moments(x: Tensor, mask: Tensor | None, group: dist.ProcessGroup | None) -> Moments:
    """Return the moments of the unmasked entries; see the public function."""
    x = x.contiguous()
    # An empty tensor still needs one program, which writes the moments of nothing.
    tiles = max(1, triton.cdiv(x.numel(), BLOCK))
    buffer = torch.empty(3 + 3 * tiles, dtype=torch.float64, device=x.device)
    done = torch.zeros(1, dtype=torch.int32, device=x.device)
    _moments_step(x, None if mask is None else mask_bytes(mask), buffer, done)
    local = Moments(*buffer[:3].unbind())
    return local if group is None else local.reduce(group)


def _moments_cost(x: Tensor, mask: Tensor | None, buffer: Tensor, done: Tensor) -> Cost:
    # Sum, difference, square and sum of every entry. The partials are read back by the last program.
    return Cost.of_pass([x, mask, buffer[3:], done], [buffer, done], 4 * x.numel())


@device_operator(
    "masked_moments_kernel(Tensor x, Tensor? mask, Tensor(a!) buffer, Tensor(b!) done)",
    _moments_cost,
)
def _moments_step(x: Tensor, mask: Tensor | None, buffer: Tensor, done: Tensor) -> None:
    # The buffer has the moments of all [3], then those of the programs [3, tiles].
    tiles = buffer.numel() // 3 - 1
    with torch.cuda.device_of(x):
        log_launch("masked_moments_kernel", "triton")
        masked_moments_kernel[(tiles,)](
            x,
            x if mask is None else mask,
            buffer[3:],
            buffer,
            done,
            x.numel(),
            tiles,
            0 if mask is None else x.numel(),
            BLOCK=BLOCK,
            **OPTIONS,
        )


class _Whiten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, moments: Moments, shift_mean: bool, eps: float) -> Tensor:
        ctx.moments, ctx.eps, ctx.dtype = moments, eps, x.dtype
        return _launch_whiten(x, moments, eps, "shift" if shift_mean else "keep", torch.float32)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        single_backward("whiten")
        (grad,) = upstream
        return _launch_whiten(grad, ctx.moments, ctx.eps, "gradient", ctx.dtype), None, None, None


def _launch_whiten(x: Tensor, moments: Moments, eps: float, mode: str, dtype: torch.dtype) -> Tensor:
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    statistics = [m.to(torch.float64) for m in (moments.count, moments.mean, moments.m2)]
    if x.numel():
        _whiten_step(x, *statistics, out, float(eps), mode)
    return out


def _whiten_cost(x: Tensor, count: Tensor, mean: Tensor, m2: Tensor, out: Tensor, eps: float, mode: str) -> Cost:
    # Difference, product and sum.
    return Cost.of_pass([x, count, mean, m2], [out], x.numel() * {"gradient": 1, "shift": 2, "keep": 3}[mode])


@device_operator(
    "whiten_kernel(Tensor x, Tensor count, Tensor mean, Tensor m2, Tensor(a!) out, float eps, str mode)", _whiten_cost
)
def _whiten_step(x: Tensor, count: Tensor, mean: Tensor, m2: Tensor, out: Tensor, eps: float, mode: str) -> None:
    with torch.cuda.device_of(x):
        log_launch("whiten_kernel", "triton")
        whiten_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            x, count, mean, m2, out, x.numel(), eps, MODE=mode, BLOCK=BLOCK, **OPTIONS
        )


def whiten(x: Tensor, moments: Moments, *, shift_mean: bool, eps: float) -> Tensor:
    """Return x whitened by `moments`; see the public function."""
    return _Whiten.apply(x, moments, shift_mean, eps)
