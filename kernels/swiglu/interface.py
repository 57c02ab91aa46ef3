"""The gated activation of an MLP on the fused output of its first layer."""

from __future__ import annotations

from torch import Tensor

from .. import validate
from ..dispatch import select


def swiglu(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return silu(gate) * up.

        gate, up = the two halves of a row,   y = gate / (1 + exp(-gate)) * up

    Source: Shazeer 2020 (arXiv:2002.05202). Computation is in fp32 (fp64 for fp64); the result is rounded once. The
    backward pass computes the activation again: nothing but the argument is saved.

    Args:
        gate_up: [..., 2 F] floating.
        out: [..., F], dtype of gate_up, contiguous, written in place; None: it is allocated.

    Returns:
        [..., F] in the dtype of gate_up, contiguous. `out` if it was passed, with the same bits and without a gradient.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: The last dimension is odd, or there is none; `out` has a wrong shape, stride or device, overlaps
            with gate_up, or a gradient would have to pass through it.
    """
    op = "swiglu"
    dims = max(1, gate_up.dim()) if isinstance(gate_up, Tensor) else 1
    validate.check_floating(op, "gate_up", gate_up, (None,) * dims)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"{op}: gate_up must have an even last dimension, got shape {tuple(gate_up.shape)}")
    if out is not None:
        validate.check_out(op, "out", out, (*gate_up.shape[:-1], gate_up.shape[-1] // 2), (gate_up,))
        validate.check_contiguous(op, "out", out)
        validate.check_apart(op, "out", out, "gate_up", gate_up)
    activated: Tensor = select(op, gate_up)(gate_up, out)
    return activated
