"""Streams with shared prompts, and the textbook's attention of every sequence alone in fp64."""

import torch

from icegrt.model import shared_prompts
from icegrt.packing import pack

# (prompt, response) lengths; equal numbers in the first place are one prompt.
CASES = {
    "one group": [(5, 3), (5, 4), (5, 3)],
    "groups and whole sequences": [(6, 2), (3, 5), (6, 7), (4, 4), (3, 5), (3, 1)],
    "one-token prompts and responses": [(1, 1), (1, 1), (2, 1), (1, 3), (2, 1)],
    "empty responses": [(4, 0), (4, 2), (2, 0), (2, 0), (3, 0)],
    "equal groups": [(4, 4), (7, 4), (4, 4), (7, 4), (9, 4), (9, 4)],
}


def stream_of(lengths, module=shared_prompts):
    """A batch of sequences with these lengths and its groups; a prompt is known by its length."""
    prompts, responses = [[n] * n for n, _ in lengths], [[1] * n for _, n in lengths]
    batch = pack(prompts, responses, tail_multiple=4, share_prompts=True)
    return batch, module.PromptGroups(batch.lengths, batch.group_sizes, batch.cu_seqlens, batch.cu_groups)


def rows_of_sequences(batch, lengths):
    """Rows of the stream of every sequence, and of the tail, in the order of their positions."""
    starts = torch.tensor([0, *batch.lengths]).cumsum(0).tolist()
    n_shared = len(batch.group_sizes)
    groups = batch.groups or [-1] * len(lengths)
    order = sorted(range(len(lengths)), key=lambda n: groups[n] if groups[n] >= 0 else len(lengths))
    rows = [None] * len(lengths)
    for segment, n in enumerate(order, start=n_shared):
        own = torch.arange(starts[segment], starts[segment] + batch.lengths[segment])
        prompt = torch.arange(starts[groups[n]], starts[groups[n] + 1]) if groups[n] >= 0 else own[:0]
        rows[n] = torch.cat([prompt, own])
        assert len(rows[n]) == sum(lengths[n])
    tail = torch.arange(batch.n_tokens - batch.tail_tokens, batch.n_tokens)
    return [*rows, tail] if batch.tail_tokens else rows


def dense(q, k, v, window):
    """Textbook attention of one sequence in the dtype of its inputs, [n, heads, d] each."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[2] ** 0.5
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
    hidden = (distance < 0) | (distance >= (window or len(q)))
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def oracle(streams, grad, rows, window):
    """Output and gradients in fp64, every sequence alone; a shared row's gradient is summed over its sequences."""
    leaves = [x.double().requires_grad_() for x in streams]
    out = torch.zeros(grad.shape, dtype=torch.float64)
    for each in rows:
        out = out.index_put((each,), dense(*(x[each] for x in leaves), window))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]


def streams_of(batch, dtype, kv_heads=2, dim=8):
    generator = torch.Generator().manual_seed(len(batch.tokens_T))
    shapes = [(batch.n_tokens, n, dim) for n in (4, kv_heads, kv_heads, 4)]
    *streams, grad = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return streams, grad


def errors(attend, streams, grad, expected):
    leaves = [x.clone().requires_grad_() for x in streams]
    out = attend(*leaves)
    results = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    return [float((x - y).norm() / y.norm().clamp(min=1.0)) for x, y in zip(results, expected, strict=True)]
