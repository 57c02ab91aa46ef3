"""Logits of a head by torch's products, with a narrow weight widened in chunks that stay in a core's cache.

On CUDA a product of halves accumulates and returns fp32 itself. torch 2.13 has no such product on CPUs (aten::mm.dtype
is not implemented there), and without AVX-512 a product of bf16 takes several times as long as one of fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linear.products import product

# Legend: N, rows; H, hidden size; V, rows of the weight; C, rows of a chunk.

# Elements of a chunk: 1 MiB of fp32, which a core's cache holds, or 8 MiB for several threads. Threads wait for each
# other twice a chunk; on cores that are shared with other work this costs more than a cache miss.
CHUNK_ELEMENTS, SHARED_CHUNK_ELEMENTS = 1 << 18, 1 << 21


def lm_logits(hidden_NH: Tensor, weight_VH: Tensor, out: Tensor) -> None:
    """Write hidden @ weight.T to `out`; see the public function."""
    halves = hidden_NH.dtype == weight_VH.dtype and hidden_NH.dtype in (torch.bfloat16, torch.float16)
    if weight_VH.dtype == out.dtype or (hidden_NH.is_cuda and halves):
        product(hidden_NH.to(weight_VH.dtype), weight_VH.t(), out=out)
        return
    hidden_NH = hidden_NH.to(out.dtype)
    size, width = weight_VH.shape
    elements = CHUNK_ELEMENTS if torch.get_num_threads() == 1 else SHARED_CHUNK_ELEMENTS
    rows = min(size, max(64, elements // max(1, width)))
    buffer_CH = torch.empty(rows, width, dtype=out.dtype, device=out.device)
    for start in range(0, size, rows):
        chunk_CH = buffer_CH[: min(rows, size - start)].copy_(weight_VH[start : start + rows])
        product(hidden_NH, chunk_CH.t(), out=out[:, start : start + rows])
