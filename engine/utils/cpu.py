"""What the processor can do."""

from __future__ import annotations

import functools
import time

import torch

from icegrt.utils.console import is_main, warn

# A quotient below this one is noise of the measurement, not a lack of instructions.
_CLEARLY_SLOWER = 1.5


@functools.cache
def bf16_slowdown() -> float:
    """Return the seconds of a bf16 matrix product over those of the same product in fp32, measured on this CPU.

    Below 1 the processor has instructions for bf16 (AVX512_BF16, AMX). Without them it is far above: 20 to 200 on a CPU
    with AVX2 alone.
    """
    return _product_seconds(torch.bfloat16) / _product_seconds(torch.float32)


def warn_of_slow_bf16(dtype: torch.dtype, device: torch.device, key: str) -> None:
    """Warn, once per key, that bf16 is slower than fp32 on this CPU.

    Args:
        dtype: of the weights.
        device: that computes.
        key: of the configuration, such as `ppo.run.dtype`.
    """
    if dtype == torch.bfloat16 and device.type == "cpu" and is_main():
        _warn_once(key)


@functools.cache
def _warn_once(key: str) -> None:
    slowdown = bf16_slowdown()
    if slowdown > _CLEARLY_SLOWER:
        warn(
            f"{key}=bf16: on this CPU a matrix product in bf16 takes {slowdown:.0f} times as long as in fp32, "
            f"for want of instructions; set {key}=fp32"
        )


def _product_seconds(dtype: torch.dtype) -> float:
    """Return the least seconds of three products of [128, 256] with [256, 256]."""
    a, b = torch.ones(128, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
    torch.mm(a, b)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
