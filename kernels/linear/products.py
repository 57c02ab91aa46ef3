"""The matrix products of the linear operations, by chunks of rows: logits, dX and dW, and the memory that they take.

One buffer holds the logits of every chunk in turn. dW is summed in fp32 whatever the weight's dtype: summed in bf16 it
is off by 0.4% after 8 chunks and by 1.4% after 128. On CUDA, low-precision operands meet in one product with an fp32
result. A CPU has no such kernel, so operands are widened first.
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
from .inputs import HeadInputs, LogitsChunk

# Legend
#   A  actions of the packed stream        H  width of the hidden states
#   R  rows that the mask keeps            V  rows of the weight, padding included
#   C  rows of a chunk                     v  rows of the weight that are vocabulary
#   L  rows of a chunk with a gradient     dX [A, H], dW [V, H]: gradients by hidden states and weight
#   wide: fp32, or fp64 if an operand is

# Bytes of logits at a time, by default. On a CPU a chunk of this size stays near the last cache. On a GPU every chunk
# reads and writes the fp32 dW, so few, tall chunks keep that traffic small: at 8192 rows, a vocabulary of 151,936 and a
# width of 4096 it is 18 ms at 4.3 TB/s in chunks of 512 rows, 4 in 2048, 2 in 4096; the products take 39.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 4 << 30}
CHUNK_ROWS_MAX = {"cpu": 1024, "cuda": 4096}


def default_chunk_rows(vocab_size: int, device: str = "cpu", free_bytes: int | None = None) -> int:
    """Return the rows per chunk for a vocabulary extent: a power of two, so that equal calls chunk equally.

        rows = min(bytes of a chunk / bytes of a row, CHUNK_ROWS_MAX), rounded down to a power of two

    Args:
        vocab_size: Columns of the vocabulary on this rank.
        device: "cpu", or any other kind, which counts as a GPU.
        free_bytes: Memory that may be taken, in bytes. A chunk then takes at most a quarter of it: fp32 logits and, on
            a GPU, their gradient beside them. A run queries it once and keeps the result. None: unknown.

    Returns:
        Rows per chunk, at least 16.
    """
    kind = "cpu" if device == "cpu" else "cuda"
    budget = CHUNK_BYTES[kind] if free_bytes is None else free_bytes // 4
    row_bytes = vocab_size * (4 if kind == "cpu" else 8)
    rows = min(CHUNK_ROWS_MAX[kind], max(16, min(budget, 2 * CHUNK_BYTES[kind]) // row_bytes))
    return 1 << (rows.bit_length() - 1)


@dataclass
class ChunkedHead:
    """Operands of the product, the rows that count, and how the vocabulary is sharded: what every chunk needs.

    Streams of a call [A] are read at `index_R`, the rows that the mask keeps, or at all rows if it is None.
    """

    hidden_AH: Tensor
    weight_VH: Tensor  # rows of the vocabulary only, in the dtype that the product reads
    labels_A: Tensor
    index_R: Tensor | None
    weight_rows: int  # V: rows of the caller's weight, padding included
    temperature: float
    entropy: bool
    shard: VocabShard | None
    chunk_rows: int
    rows_known: bool = False  # the caller named the rows that count: none of them is ignored
    drop_inactive: bool = True  # rows without a gradient enter no product of the backward

    @classmethod
    def of(cls, head: HeadInputs, entropy: bool) -> ChunkedHead:
        """Return the head of one call."""
        hidden_AH, weight_VH, shard = head.hidden_AH, head.weight_VH, head.shard
        dtype = _product_dtype(hidden_AH, weight_VH)
        # Rows of the vocabulary are a prefix, so leaving out the padding costs no copy.
        weight = weight_VH.detach()[: weight_VH.shape[0] if shard is None else shard.valid].to(dtype)
        index_R = head.rows_R if isinstance(head.rows_R, Tensor) else None
        if head.mask_A is not None and head.rows_R is None:
            # nonzero makes the host wait for the device once: the number of rows decides how many chunks there are.
            index_R = ((head.mask_A != 0) & (head.labels_A != IGNORED_LABEL)).nonzero().squeeze(1)
        return cls(
            hidden_AH=hidden_AH.detach(),
            weight_VH=weight,
            labels_A=head.labels_A,
            index_R=index_R,
            weight_rows=weight_VH.shape[0],
            temperature=head.temperature,
            entropy=entropy,
            shard=shard,
            chunk_rows=head.chunk_rows or default_chunk_rows(weight_VH.shape[0], hidden_AH.device.type),
            rows_known=head.rows_R is not None,
            drop_inactive=head.drop_inactive or hidden_AH.device.type == "cpu",
        )

    @cached_property
    def labels_R(self) -> Tensor:
        """Labels of the rows that count."""
        return self.labels_A if self.index_R is None else self.labels_A[self.index_R]

    @property
    def wide(self) -> torch.dtype:
        """The dtype of logits and gradients."""
        return wide_dtype(self.hidden_AH, self.weight_VH)

    def subset(self, keep_A: Tensor) -> ChunkedHead:
        """Return the same head over fewer rows: those of keep_A [A] whose label counts."""
        return replace(self, index_R=(keep_A & (self.labels_A != IGNORED_LABEL)).nonzero().squeeze(1))

    def gather_rows(self, x_A: Tensor) -> Tensor:
        """Return a stream at the rows that count, in the wide dtype."""
        return (x_A if self.index_R is None else x_A[self.index_R]).to(self.wide)

    def scatter_rows(self, x_R: Tensor) -> Tensor:
        """Return the stream [A] with 0 at the rows that do not count."""
        if self.index_R is None:
            return x_R
        return x_R.new_zeros(self.hidden_AH.shape[0]).index_copy_(0, self.index_R, x_R)

    def chunks(self) -> Iterator[slice]:
        """Return slices of the rows that count, in order."""
        rows = self.labels_R.shape[0]
        return (slice(start, min(start + self.chunk_rows, rows)) for start in range(0, rows, self.chunk_rows))

    def hidden(self, chunk: slice) -> Tensor:
        """Return the chunk's hidden states as the product reads them."""
        labels = self.labels_R[chunk]
        rows = self.hidden_AH[chunk if self.index_R is None else self.index_R[chunk]].to(self.weight_VH.dtype)
        # With an index the ignored rows are gone. Without one, a CPU looks for them; a GPU would have to wait.
        if (
            self.index_R is None
            and not self.rows_known
            and (labels.device.type != "cpu" or (labels == IGNORED_LABEL).any())
        ):
            # An ignored row may hold NaN, and 0 * NaN would reach dW through the product.
            rows = rows.masked_fill((labels == IGNORED_LABEL)[:, None], 0.0)
        return rows

    @cached_property
    def _buffer(self) -> Tensor:
        rows = min(self.chunk_rows, self.labels_R.shape[0])
        return torch.empty(rows, self.weight_VH.shape[0], dtype=self.wide, device=self.hidden_AH.device)

    def release(self) -> None:
        """Free the buffer. Autograd keeps the head until backward, and must not keep a chunk of logits with it."""
        self.__dict__.pop("_buffer", None)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [C, v] logits, in the buffer that the next chunk overwrites."""
        return product(hidden, self.weight_VH.t(), out=self._buffer[: hidden.shape[0]])


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    # Under autocast, its dtype; elsewhere on CUDA the operands' own, since the product accumulates and returns fp32.
    if hidden.is_cuda and torch.is_autocast_enabled("cuda") and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype("cuda")
    low_precision = hidden.is_cuda and hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16)
    return hidden.dtype if low_precision else wide_dtype(hidden, weight)


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """Compute out = a @ b, or out += a @ b, with a wide `out` whatever a and b are, and return out."""
    options = {"out": out} if a.dtype == out.dtype else {"out": out, "out_dtype": out.dtype}
    return torch.addmm(out, a, b, **options) if add else torch.mm(a, b, **options)


class Gradients:
    """dX [A, H] and dW [V, H] in the wide dtype, summed chunk by chunk.

    wanted: whether to form dX, and whether to form dW. buffer_VH: the caller's buffer for dW, or None for a new one.
    """

    def __init__(self, head: ChunkedHead, wanted: tuple[bool, bool], buffer_VH: Tensor | None = None) -> None:
        self.head = head
        self.hidden_AH: Tensor | None = None
        self.weight_VH: Tensor | None = None
        # Whether weight_VH has content to add to. The first chunk then overwrites, which saves a pass of zeros.
        self._weight_has_content = buffer_VH is not None
        width, device = head.hidden_AH.shape[1], head.hidden_AH.device
        if wanted[0]:
            # Zeros: rows that do not count are never written.
            self.hidden_AH = torch.zeros(head.hidden_AH.shape, dtype=head.wide, device=device)
        if wanted[1] and buffer_VH is None:
            self.weight_VH = torch.empty(head.weight_rows, width, dtype=head.wide, device=device)
        elif wanted[1]:
            self.weight_VH = buffer_VH

    def add(self, chunk: LogitsChunk, active: Tensor | None, dz: Tensor, scale: Tensor | None) -> None:
        """Add one chunk: dz [L, v] of its active rows (None: all), each of which still lacks the factor `scale` [L].

        Both products have a narrow side, and that is where a factor per row costs nothing.
        """
        if self.hidden_AH is not None:
            self._add_hidden(self.hidden_AH, chunk.rows, active, dz, scale)
        if self.weight_VH is not None and dz.shape[1]:
            # dW += dz^T X
            hidden = chunk.hidden if active is None else chunk.hidden[active]
            hidden = hidden if scale is None else hidden * scale[:, None]
            columns = dz.shape[1]
            product(dz.t(), hidden, out=self.weight_VH[:columns], add=self._weight_has_content)
            if not self._weight_has_content and columns < self.weight_VH.shape[0]:
                # The products write rows of the vocabulary only; those of the padding start as zeros.
                self.weight_VH[columns:].zero_()
            self._weight_has_content = True

    def _add_hidden(
        self, hidden_AH: Tensor, rows: slice, active: Tensor | None, dz: Tensor, scale: Tensor | None
    ) -> None:
        # dX = dz W, written in place if the rows are contiguous in dX.
        index_R = self.head.index_R
        in_place = active is None and index_R is None
        dx = hidden_AH[rows] if in_place else hidden_AH.new_empty(dz.shape[0], hidden_AH.shape[1])
        product(dz, self.head.weight_VH, out=dx)
        if scale is not None:
            dx.mul_(scale[:, None])
        if not in_place:
            index = torch.arange(rows.start, rows.stop, device=dx.device) if index_R is None else index_R[rows]
            hidden_AH.index_copy_(0, index if active is None else index[active], dx)

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """Return (dX, dW). With a dX, a collective over the shard's group."""
        shard = self.head.shard
        if self.hidden_AH is not None and shard is not None and shard.group is not None:
            # One all-reduce per call, not one per chunk.
            dist.all_reduce(self.hidden_AH, group=shard.group)
        if self.weight_VH is not None and not self._weight_has_content:
            # No chunk came: every row was masked, or had no gradient.
            self.weight_VH.zero_()
        return self.hidden_AH, self.weight_VH
