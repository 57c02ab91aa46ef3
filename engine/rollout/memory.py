"""How many blocks a KV cache has: from the memory that is free when it is allocated."""

from __future__ import annotations

import os
import re

import torch

from icegrt.errors import ConfigError

_UNITS = {"": 1, "B": 1} | {f"{p}{s}": b**i for i, p in enumerate("KMGT", 1) for s, b in (("B", 1000), ("iB", 1024))}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*([KMGT]?i?B?)\s*", re.IGNORECASE)


def cache_bytes(kv_memory: float | str, device: torch.device) -> int:
    """Return the bytes that the caches of this rank may have.

    Args:
        kv_memory: up to 1: a share of the free memory of the device (of a CPU: of what is available, divided by the
            ranks of this machine); above 1: bytes; a text: bytes with a unit, such as "20GiB".
        device: of the cache.

    Raises:
        ConfigError: `kv_memory` is not such a number or text.
    """
    number = parse_memory(kv_memory)
    return int(number * free_bytes(device)) if number <= 1 else int(number)


def parse_memory(kv_memory: float | str) -> float:
    """Return a share of up to 1, or bytes.

    Raises:
        ConfigError: `kv_memory` is neither.
    """
    match = _SIZE.fullmatch(str(kv_memory))
    unit = {name.lower(): factor for name, factor in _UNITS.items()}.get(match[2].lower()) if match else None
    number = float(match[1]) * unit if match and unit is not None else 0.0
    if not 0 < number < float("inf"):
        raise ConfigError(
            f"rollout.kv_memory: expected a share of free memory up to 1, or bytes such as 20GiB, got {kv_memory!r}"
        )
    return number


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device. Ranks of one machine share a CPU's memory in equal parts."""
    if torch.cuda.is_available() and device.type != "cpu":
        free: int = torch.cuda.mem_get_info()[0]
        return free
    return available_host_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def available_host_bytes() -> int:
    """Return the memory that the host can give without swapping; half of its memory where Linux's figure is absent."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
