"""swiglu in plain PyTorch."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu

from ..common.precision import widen
from ..validate import wide_dtype


def swiglu(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """Return silu(gate) * up; see the public function."""
    gate, up = widen(gate_up, wide_dtype(gate_up)).chunk(2, dim=-1)
    activated = silu(gate) * up
    return activated.to(gate_up.dtype) if out is None else out.copy_(activated)
