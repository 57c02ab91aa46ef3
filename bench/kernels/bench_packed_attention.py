"""packed_attention, forward and backward: ours, the reference, and padded attention as a padded batch takes it."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench import harness
from icegrt.kernels import packed_attention, use_backend

HEADS, GROUPS, WIDTH = 8, 4, 64
# Shortest and longest sequence, and their number.
CASES = ((80, 128, 32), (32, 512, 16))


def padded_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Return attention of a padded batch; a causal mask suffices, as rows of the padding are left out."""
    batch = [torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2) for x in (q, k, v)]
    out = scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True).transpose(1, 2)
    return torch.cat([rows[:n] for rows, n in zip(out, lengths, strict=True)])


def run_case(options, low: int, high: int, count: int, dtype: torch.dtype, backward: bool) -> list[dict]:
    """Time one case."""
    draw = random.Random(0)
    lengths = [draw.randint(low, high) for _ in range(count)]
    drawn = [torch.randn(sum(lengths), n, WIDTH) for n in (HEADS, GROUPS, GROUPS)]
    tensors = [x.to(options.device, dtype).requires_grad_(backward) for x in drawn]
    upstream = torch.randn(sum(lengths), HEADS, WIDTH).to(options.device, dtype)

    def results(call, inputs: list[Tensor], grad: Tensor):
        def once() -> list[Tensor]:
            with torch.set_grad_enabled(backward):
                out = call(*inputs, lengths)
            return [out, *torch.autograd.grad(out, inputs, grad)] if backward else [out]

        return once

    def on(backend: str):
        def call(*inputs):
            with use_backend(backend):
                return packed_attention(*inputs)

        return call

    wide = [x.detach().double().requires_grad_(backward) for x in tensors]
    truth = results(on("reference"), wide, upstream.double())()
    largest = max(x.abs().max().item() for x in truth)

    def error(out: list[Tensor]) -> float:
        return max((a.double() - b).abs().max().item() for a, b in zip(out, truth, strict=True)) / largest

    calls = {"reference": on("reference"), "padded SDPA": padded_attention}
    if options.device == "cpu":
        calls = {"ours": on("cpp"), **calls}
    name = str(dtype).removeprefix("torch.")
    return harness.compare(
        "packed_attention",
        f"N{count} L{low}-{high} {name} {'both' if backward else 'forward'}",
        {key: results(call, tensors, upstream) for key, call in calls.items()},
        error=error,
        tolerance=2e-2 if dtype == torch.bfloat16 else 1e-4,
        rounds=options.rounds,
        device=options.device,
    )


def main() -> None:
    """Run the bench."""
    options = harness.arguments(__doc__)
    rows = []
    for low, high, count in CASES[: 1 if options.quick else None]:
        for dtype in (torch.float32, torch.bfloat16):
            for backward in (False, True):
                rows += run_case(options, low, high, count, dtype, backward)
    harness.write("packed_attention", rows, options)


if __name__ == "__main__":
    main()
