"""The heads on the trunk: the LM head (a weight that fused kernels multiply by) and the scalar head."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor, nn


class LMHead(nn.Module):
    """The output projection's weight, [V / TP, H]. A call returns the weight: kernels form the logits themselves."""

    def __init__(self, config, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, config.hidden_size, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self) -> Tensor:
        return self.weight

    def sharded_state_dict(self, prefix: str = "", sharded_offsets=(), metadata=None):
        """Return the entry for Megatron's dist_checkpointing, sharded along the vocabulary."""
        key = f"{prefix}weight"
        return {key: make_tp_sharded_tensor_for_checkpoint(self.weight, key, allow_shape_mismatch=True)}


class AddedToMainGrad(torch.autograd.Function):
    """The identity on a parameter whose gradient a kernel adds to `main_grad` itself.

    Megatron 0.16: DDP counts a parameter as ready in a hook that needs a gradient, and adds it to `main_grad` unless
    the parameter is marked -> the parameter is marked and gets a gradient that nobody reads.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Tensor:
        ctx.weight.grad_added_to_main_grad = True
        return torch.empty_like(ctx.weight)


class ScalarHead(nn.Module):
    """One number per row: reward or value. [R, H] -> [R] float32."""

    def __init__(self, config) -> None:
        super().__init__()
        # Float32 for every trunk dtype: one row of weights is cheap, and bf16 would quantise scores to 8 bits.
        self.weight = nn.Parameter(torch.zeros(1, config.hidden_size, dtype=torch.float32))
        self.weight.sequence_parallel = False

    @torch.no_grad()
    def scale_by(self, factor: float) -> None:
        """Multiply all later outputs by `factor`."""
        self.weight.mul_(factor)

    def forward(self, hidden_RH: Tensor) -> Tensor:
        return nn.functional.linear(hidden_RH.float(), self.weight).squeeze(-1)
