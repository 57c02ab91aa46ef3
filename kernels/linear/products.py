"""The matrix products of the linear operations, by chunks of rows: logits, dX and dW, and the memory that they take.

One buffer holds the logits of every chunk in turn. dW is summed in fp32 whatever the weight's dtype (summed in bf16 it
is off by 0.4% after 8 chunks, 1.4% after 128). Low-precision operands meet in one product with an fp32 result on CUDA;
elsewhere, where there is no such kernel, they are widened first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from ..types import VocabShard
from ..validate import IGNORED_LABEL, wide_dtype

# Bytes of logits at a time, by default. On a CPU a chunk of this size stays near the last cache; on a GPU few, tall
# chunks keep the traffic of the fp32 dW small, which every chunk reads and writes: at 8192 rows, a vocabulary of
# 151,936 and a width of 4096 it is 18 ms at 4.3 TB/s in chunks of 512 rows, 4 in 2048, 2 in 4096; the products are 39.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 4 << 30}
CHUNK_ROWS_MAX = {"cpu": 1024, "cuda": 4096}


def default_chunk_rows(vocab_size: int, device: str = "cpu", free_bytes: int | None = None) -> int:
    """Rows per chunk: a power of two, from the vocabulary extent of this rank, so that equal calls chunk equally.

    free_bytes: memory that may be taken, where it is known (a run asks once and keeps the answer): a chunk then takes
    at most a quarter of it (fp32 logits and, on a GPU, their gradient beside them).
    """
    kind = "cpu" if device == "cpu" else "cuda"
    room = CHUNK_BYTES[kind] if free_bytes is None else free_bytes // 4
    row_bytes = vocab_size * (4 if kind == "cpu" else 8)
    rows = min(CHUNK_ROWS_MAX[kind], max(16, min(room, 2 * CHUNK_BYTES[kind]) // row_bytes))
    return 1 << (rows.bit_length() - 1)


@dataclass
class ChunkedHead:
    """What every chunk needs: operands of the product, the rows that count, and how the vocabulary is spread.

    The streams of a call ([A]) are read at `index_R`, the rows that the mask keeps, or at all rows where it is None.
    """

    hidden_AH: Tensor
    weight_VH: Tensor  # the vocabulary's rows only, in the dtype that the product reads
    labels_A: Tensor
    index_R: Tensor | None
    padded: int  # rows of the caller's weight, padding included
    temperature: float
    entropy: bool
    shard: VocabShard | None
    chunk_rows: int

    @classmethod
    def of(cls, hidden_AH, weight_VH, labels_A, mask_A, temperature, entropy, shard, chunk_rows) -> ChunkedHead:
        dtype = _product_dtype(hidden_AH, weight_VH)
        weight = weight_VH.detach()[: weight_VH.shape[0] if shard is None else shard.valid].to(dtype)
        index_R = None if mask_A is None else ((mask_A != 0) & (labels_A != IGNORED_LABEL)).nonzero().squeeze(1)
        rows = chunk_rows or default_chunk_rows(weight_VH.shape[0], hidden_AH.device.type)
        padded = weight_VH.shape[0]
        return cls(hidden_AH.detach(), weight, labels_A, index_R, padded, temperature, entropy, shard, rows)

    @cached_property
    def labels_R(self) -> Tensor:
        return self.labels_A if self.index_R is None else self.labels_A[self.index_R]

    @property
    def wide(self) -> torch.dtype:
        return wide_dtype(self.hidden_AH, self.weight_VH)

    def subset(self, keep_A: Tensor) -> ChunkedHead:
        """The same head over fewer rows: those of keep_A [A] whose label counts."""
        return replace(self, index_R=(keep_A & (self.labels_A != IGNORED_LABEL)).nonzero().squeeze(1))

    def gather_rows(self, x_A: Tensor | None) -> Tensor | None:
        """A stream at the rows that count, in the dtype of the mathematics."""
        if x_A is None:
            return None
        return (x_A if self.index_R is None else x_A[self.index_R]).to(self.wide)

    def scatter_rows(self, x_R: Tensor) -> Tensor:
        """The stream [A] with 0 at the rows that do not count."""
        if self.index_R is None:
            return x_R
        return x_R.new_zeros(self.hidden_AH.shape[0]).index_copy_(0, self.index_R, x_R)

    def chunks(self) -> Iterator[slice]:
        """Slices of the rows that count, in order."""
        rows = self.labels_R.shape[0]
        return (slice(start, min(start + self.chunk_rows, rows)) for start in range(0, rows, self.chunk_rows))

    def hidden(self, chunk: slice) -> Tensor:
        """The chunk's hidden states as the product reads them."""
        labels = self.labels_R[chunk]
        rows = self.hidden_AH[chunk if self.index_R is None else self.index_R[chunk]].to(self.weight_VH.dtype)
        if self.index_R is None and (labels.device.type != "cpu" or (labels == IGNORED_LABEL).any()):
            # An ignored row may hold NaN, and 0 * NaN would reach dW through the product.
            rows = rows.masked_fill((labels == IGNORED_LABEL)[:, None], 0.0)
        return rows

    @cached_property
    def _buffer(self) -> Tensor:
        rows = min(self.chunk_rows, self.labels_R.shape[0])
        return torch.empty(rows, self.weight_VH.shape[0], dtype=self.wide, device=self.hidden_AH.device)

    def release(self) -> None:
        """Gives the buffer up: autograd keeps the head until backward, and must not keep a chunk of logits with it."""
        self.__dict__.pop("_buffer", None)

    def logits(self, hidden: Tensor) -> Tensor:
        """[C, v] logits over the temperature, in the buffer that the next chunk overwrites."""
        z = product(hidden, self.weight_VH.t(), out=self._buffer[: hidden.shape[0]])
        return z if self.temperature == 1.0 else z.div_(self.temperature)


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    if hidden.is_cuda and torch.is_autocast_enabled("cuda") and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype("cuda")
    mixed = hidden.is_cuda and hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16)
    return hidden.dtype if mixed else wide_dtype(hidden, weight)


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b, with `out` wide whatever a and b are."""
    options = {"out": out} if a.dtype == out.dtype else {"out": out, "out_dtype": out.dtype}
    return torch.addmm(out, a, b, **options) if add else torch.mm(a, b, **options)


class Gradients:
    """dX [A, H] and dW [V, H] in the wide dtype, chunk by chunk; dX is summed over the shard's group once, at the end.

    into: the caller's buffer for dW, or None for a new one.
    """

    def __init__(self, head: ChunkedHead, hidden: bool, weight: bool, into: Tensor | None = None) -> None:
        self.head = head
        self.hidden_AH = self.weight_VH = None
        shape, options = head.hidden_AH.shape, {"dtype": head.wide, "device": head.hidden_AH.device}
        if hidden:
            self.hidden_AH = torch.zeros(shape, **options)
        self._written = into is not None
        if weight:
            self.weight_VH = torch.empty(head.padded, shape[1], **options) if into is None else into

    def add(self, chunk: slice, active: Tensor | None, dz: Tensor, scale: Tensor | None, hidden: Tensor) -> None:
        """One chunk: dz [L, v] of its rows `active` (None: all) and their hidden states; each row still lacks `scale`.

        Both products have a narrow side, and that is where a factor per row costs nothing.
        """
        if self.hidden_AH is not None:
            self._add_hidden(chunk, active, dz, scale)
        if self.weight_VH is not None and dz.shape[1]:
            hidden = hidden if active is None else hidden[active]
            hidden = hidden if scale is None else hidden * scale[:, None]
            product(dz.t(), hidden, out=self.weight_VH[: dz.shape[1]], add=self._written)
            self._zero_padding(dz.shape[1])
            self._written = True

    def _add_hidden(self, chunk: slice, active: Tensor | None, dz: Tensor, scale: Tensor | None) -> None:
        index_R = self.head.index_R
        whole = active is None and index_R is None
        dx = self.hidden_AH[chunk] if whole else self.hidden_AH.new_empty(dz.shape[0], self.hidden_AH.shape[1])
        product(dz, self.head.weight_VH, out=dx)
        if scale is not None:
            dx.mul_(scale[:, None])
        if not whole:
            rows = torch.arange(chunk.start, chunk.stop, device=dx.device) if index_R is None else index_R[chunk]
            self.hidden_AH.index_copy_(0, rows if active is None else rows[active], dx)

    def _zero_padding(self, columns: int) -> None:
        if not self._written and columns < self.weight_VH.shape[0]:
            self.weight_VH[columns:].zero_()

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """(dX, dW). A collective over the shard's group where there is a dX."""
        shard = self.head.shard
        if self.hidden_AH is not None and shard is not None and shard.group is not None:
            dist.all_reduce(self.hidden_AH, group=shard.group)
        if self.weight_VH is not None and not self._written:
            self.weight_VH.zero_()
        return self.hidden_AH, self.weight_VH
