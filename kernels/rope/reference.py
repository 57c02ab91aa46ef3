"""Rotary position embeddings in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.precision import widen
from ..validate import wide_dtype


def rope(q_TND: Tensor, k_TGD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor]:
    """Return rotated queries and keys; see the public function."""
    dtype = wide_dtype(q_TND)
    cos, sin = cos_TR.to(dtype)[:, None], sin_TR.to(dtype)[:, None]

    def rotate(x_THD: Tensor) -> Tensor:
        low, high = widen(x_THD, dtype).chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x_THD.dtype)

    return rotate(q_TND), rotate(k_TGD)


def rope_qkv(qkv_TGMD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries and keys, and values; see the public function."""
    q, k, v = qkv_TGMD.split([qkv_TGMD.shape[2] - 2, 1, 1], dim=2)
    return *rope(q.flatten(1, 2), k.flatten(1, 2), cos_TR, sin_TR), v.flatten(1, 2).contiguous()
