"""Optional inputs of operations over token streams: masks as bytes, turns, coefficients that may switch a term off."""

from __future__ import annotations

import torch
from torch import Tensor

# Legend: A, actions of the packed stream.


def mask_bytes(mask_A: Tensor) -> Tensor:
    """Return a mask as kernels read it: contiguous uint8, one byte per token, 0 where masked."""
    # A bool tensor already holds one byte per entry, so its view costs no copy.
    return (mask_A if mask_A.dtype == torch.bool else mask_A != 0).contiguous().view(torch.uint8)


def turn_starts(keep_A: Tensor, cu_actions: Tensor) -> Tensor:
    """Return [A] bool: the first entry of each turn, a maximal run of kept entries of one sequence.

    Args:
        keep_A: [A] bool, the unmasked entries.
        cu_actions: [N + 1] integers, offsets of the sequences, at most A. Entries beyond the last are no turn's.
    """
    extent = keep_A.shape[0]
    offsets = cu_actions.long()
    # An entry before a sequence is none of its own. Offsets of A, of empty sequences at the end, fall into the extra.
    begins_A = torch.zeros(extent + 1, dtype=torch.bool, device=keep_A.device)
    begins_A[offsets] = True
    follows_A = torch.cat([keep_A.new_zeros(min(1, extent)), keep_A[:-1]]) & ~begins_A[:extent]
    return keep_A & ~follows_A & (torch.arange(extent, device=keep_A.device) < offsets[-1])


def may_be_nonzero(coefficient: float | Tensor) -> bool:
    """Return False only for the Python number 0. A tensor counts as nonzero: reading it would synchronise a device."""
    return isinstance(coefficient, Tensor) or coefficient != 0
