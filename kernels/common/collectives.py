"""On which device a process group communicates: NCCL refuses CPU tensors, gloo takes them."""

from __future__ import annotations

import torch
import torch.distributed as dist

__all__ = ["communication_device"]


def communication_device(group: dist.ProcessGroup | None, preferred: torch.device) -> torch.device:
    """Return the device of tensors in a collective of `group`.

    Args:
        group: Process group. None: the default group.
        preferred: The device of the tensors, which is returned if the group communicates on it.

    Returns:
        `preferred`, or the current device of the group's backend.
    """
    # "cpu:gloo,cuda:nccl"
    types = [entry.split(":")[0] for entry in dist.get_backend_config(group).split(",")]
    if preferred.type in types:
        return preferred
    return torch.device("cuda", torch.cuda.current_device()) if "cuda" in types else torch.device(types[0])
