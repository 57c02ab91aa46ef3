"""What the tests of the paged KV cache share: sequences in random blocks, and an oracle that knows no blocks."""

from dataclasses import dataclass

import torch

from icegrt.kernels import paged_attention, rope_qkv, use_backend, write_kv
from tests.helpers.kernel_cases import assert_within_budget
from tests.helpers.trunk_cases import tables


@dataclass
class Paged:
    """Rows of sequences, their keys and values by token, and the same in blocks.

    k, v: of each sequence, [length, G, D]; row_counts: rows of each sequence, its last tokens.
    """

    q: torch.Tensor
    k: list
    v: list
    row_counts: list
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor
    row_starts: torch.Tensor

    def attend(self, backend, **keywords):
        """Return the attention of all rows on a backend, in the dtype of q."""
        if any(count != 1 for count in self.row_counts):
            keywords = {"row_starts": self.row_starts} | keywords
        caches = (self.key_cache.to(self.q.dtype), self.value_cache.to(self.q.dtype))
        with use_backend(backend):
            return paged_attention(self.q, *caches, self.tables, self.lengths, **keywords)

    def only(self, *sequences, seed=3, block_size=None):
        """Return the same for some of the sequences in this order, in other blocks."""
        starts = self.row_starts.tolist()
        q = torch.cat([self.q[starts[s] : starts[s + 1]] for s in sequences])
        parts = ([x[s] for s in sequences] for x in (self.k, self.v, self.row_counts))
        return paged(q, *parts, block_size or self.key_cache.shape[2], seed=seed)

    def row(self, result, sequence):
        """Return the rows of a sequence."""
        return result[self.row_starts[sequence] : self.row_starts[sequence + 1]]


def draw(lengths, row_counts=None, *, heads=6, groups=2, width=20, block_size=16, dtype=torch.float32, seed=0):
    """Return drawn sequences, in blocks of a random order with NaN in every slot that no token has."""
    generator = torch.Generator().manual_seed(seed)
    row_counts = row_counts or [1] * len(lengths)

    def stream(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    k, v = ([stream(max(0, n), groups, width) for n in lengths] for _ in range(2))
    return paged(2 * stream(sum(row_counts), heads, width), k, v, row_counts, block_size, seed=seed)


def paged(q, k, v, row_counts, block_size, *, seed):
    """Return sequences with their tokens in random blocks."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [len(x) for x in k]
    counts = [-(-n // block_size) for n in lengths]
    blocks = sum(counts) + 3
    order = torch.randperm(blocks, generator=generator).tolist()
    caches = torch.full((2, blocks, k[0].shape[1], block_size, k[0].shape[2]), torch.nan, dtype=q.dtype)
    tables = torch.full((len(k), max(1, *counts, 1)), -7, dtype=torch.int32)
    for s, count in enumerate(counts):
        tables[s, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
        for t in range(lengths[s]):
            for cache, tokens in zip(caches, (k[s], v[s]), strict=True):
                cache[tables[s, t // block_size], :, t % block_size] = tokens[t]
    starts = torch.tensor([0, *torch.tensor(row_counts).cumsum(0).tolist()], dtype=torch.int32)
    return Paged(q, k, v, row_counts, *caches, tables, torch.tensor(lengths, dtype=torch.int32), starts)


def plain_attention(case, dtype, window=None, scale=None):
    """Return the attention of all rows, by row and head, in a dtype; it shares no line with ours."""
    out = torch.zeros(case.q.shape, dtype=dtype)
    scale = case.q.shape[2] ** -0.5 if scale is None else scale
    per_group = case.q.shape[1] // case.key_cache.shape[1]
    for s, count in enumerate(case.row_counts):
        for index in range(count):
            row = int(case.row_starts[s]) + index
            end = len(case.k[s]) - (count - 1 - index)
            start = 0 if window is None else max(0, end - window)
            if end <= 0:
                continue
            for head in range(case.q.shape[1]):
                keys, values = (x[s][start:end, head // per_group].to(dtype) for x in (case.k, case.v))
                weights = torch.softmax(keys @ case.q[row, head].to(dtype) * scale, 0)
                out[row, head] = weights @ values
    return out


def assert_attention_within_budget(case, backend, slack=1e-6, **keywords):
    """Assert that a backend's attention is within the error budget against fp64."""
    plain = {name: keywords[name] for name in ("window", "scale") if name in keywords}
    ours = case.attend(backend, **keywords)
    assert ours.dtype == case.q.dtype and ours.shape == case.q.shape
    truth = plain_attention(case, torch.float64, **plain)
    if truth.numel():
        assert_within_budget(ours, plain_attention(case, case.q.dtype, **plain), truth, slack)


def drawn_caches(rows, groups, width, block_size, dtype, seed=0):
    """Return k, v [rows, G, D], two caches with more slots than rows, and a slot for each row."""
    generator = torch.Generator().manual_seed(seed)
    blocks = rows // block_size + 3
    shapes = [(rows, groups, width)] * 2 + [(blocks, groups, block_size, width)] * 2
    slots = torch.randperm(blocks * block_size, generator=generator)[:rows].int()
    return *(torch.randn(*shape, generator=generator).to(dtype) for shape in shapes), slots


def expected_writes(k, v, keys, values, slots):
    """Return both caches with the rows written, row by row."""
    caches = [keys.clone(), values.clone()]
    for cache, rows in zip(caches, (k, v), strict=True):
        for row, slot in enumerate(slots.tolist()):
            if slot >= 0:
                cache[slot // cache.shape[2], :, slot % cache.shape[2]] = rows[row]
    return caches


def expected_copies(cache, pairs):
    """Return a cache whose targets have what their sources had."""
    out = cache.clone()
    for source, target in pairs:
        if min(source, target) >= 0:
            out[:, target] = cache[:, source]
    return out


def same_bits(ours, theirs):
    """Return whether two lists of tensors have equal bits."""
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(ours, theirs, strict=True)
    )


def drawn_projection(rows, groups, queries, width, block_size, dtype, seed=0):
    """Return qkv [rows, G, queries + 2, D], cosines, sines, two caches and a slot for each row."""
    _, _, *caches, slots = drawn_caches(rows, groups, width, block_size, dtype, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    qkv = torch.randn(rows, groups, queries + 2, width, generator=generator).to(dtype)
    return qkv, *tables(rows, width // 2, seed), *caches, slots


def in_two_calls(backend, qkv, cos, sin, keys, values, slots):
    """Return queries and both caches after rope_qkv and write_kv; the caches that were passed stay as they are."""
    caches = [keys.clone(), values.clone()]
    with use_backend(backend):
        q, k, v = rope_qkv(qkv, cos, sin)
        write_kv(k, v, *caches, slots)
    return [q, *caches]
