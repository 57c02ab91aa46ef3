"""Helpers of the kernel benches: chunk sizes, other libraries that may be installed, and lower bounds of the time."""

from __future__ import annotations

import importlib

import torch

from icegrt.kernels import default_chunk_rows


def chunk_rows(options, vocab_size: int) -> int | None:
    """Return the chunk size of a run: from free memory on a GPU, None (the default) on a CPU."""
    if options.device != "cuda":
        return None
    torch.cuda.empty_cache()
    return default_chunk_rows(vocab_size, "cuda", torch.cuda.mem_get_info()[0])


def wide(logits):
    """Return logits in fp32, as trainers widen them; fp64 logits, of the exact result, stay."""
    return logits if logits.dtype == torch.float64 else logits.float()


def peer(options, module: str, name: str, needs_cuda: bool = True):
    """Return an attribute of another package, or print why and return None if it is not installed or cannot run."""
    package = module.split(".")[0]
    if needs_cuda and options.device != "cuda":
        print(f"{package}: left out, its kernels need a CUDA device")
        return None
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        print(f"{package}: left out, {error}")
        return None


def floor_ms(options, *, flops: float = 0.0, traffic: float = 0.0) -> float | None:
    """Return the milliseconds that `flops` or `traffic` bytes take on a device with measured rates, else None."""
    if options.device != "cuda" or "H200" not in torch.cuda.get_device_name():
        return None
    return max(flops / 790e12, traffic / 4.3e12) * 1e3
