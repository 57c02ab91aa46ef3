"""swiglu on CPU threads (csrc/swiglu.hpp): one pass forward, one backward, fp32 inside for bf16."""

from __future__ import annotations

import torch
from torch import Tensor

from icegrt import _C

from ..common.host import dtype_name, hold
from ..common.precision import saturating_cast
from ..dispatch import log_launch
from .function import Steps, run


def _forward(gate_up: Tensor, out: Tensor) -> None:
    dtype = dtype_name(gate_up)
    if dtype is None:  # fp16
        wide = out.new_empty(out.shape, dtype=torch.float32)
        _forward(gate_up.float(), wide)
        out.copy_(wide)
        return
    width = out.shape[-1]
    log_launch("swiglu_forward", "cpp")
    _C.swiglu_forward(dtype, gate_up.data_ptr(), out.data_ptr(), out.numel() // width, width, torch.get_num_threads())
    hold(gate_up, out)


def _backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    dtype = dtype_name(gate_up, grad)
    if dtype is None:
        return saturating_cast(_backward(gate_up.float(), grad.float()), gate_up.dtype)
    width = grad.shape[-1]
    grad_gate_up = torch.empty_like(gate_up)
    log_launch("swiglu_backward", "cpp")
    _C.swiglu_backward(
        dtype,
        gate_up.data_ptr(),
        grad.data_ptr(),
        grad_gate_up.data_ptr(),
        grad.numel() // max(1, width),
        width,
        torch.get_num_threads(),
    )
    hold(gate_up, grad, grad_gate_up)
    return grad_gate_up


_STEPS = Steps(_forward, _backward)


def swiglu(gate_up: Tensor, out: Tensor | None) -> Tensor:
    """Return silu(gate) * up; see the public function."""
    return run(_STEPS, gate_up, out)
