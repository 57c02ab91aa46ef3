"""pack_padded: ours, against a Python loop over the batch that finds the same rows."""

from __future__ import annotations

import torch

from bench import harness
from icegrt.kernels import pack_padded


def loop(ids, attention, response):
    rows = []
    for b, (real, chosen) in enumerate(zip(attention.tolist(), response.tolist(), strict=True)):
        before = None
        for column, (attended, is_action) in enumerate(zip(real, chosen, strict=True)):
            if is_action:
                rows.append(b * ids.shape[1] + before)
            before = column if attended else before
    return torch.tensor(rows)


def main():
    options = harness.arguments(__doc__)
    rows = []
    for B, L in [(8, 256)] if options.quick else [(8, 256), (64, 2048)]:
        ids = torch.randint(0, 1000, (B, L), device=options.device)
        attention = torch.ones_like(ids)
        attention[:, : L // 8] = 0
        response = torch.zeros_like(ids)
        response[:, L // 2 :] = 1
        truth = loop(ids, attention, response)
        rows += harness.compare(
            "pack_padded",
            f"B{B} L{L}",
            {
                "ours": lambda x=(ids, attention, response): pack_padded(*x).action_rows_A,
                "loop": lambda x=(ids, attention, response): loop(*x),
            },
            error=lambda out, truth=truth: float((out.cpu() != truth).sum()),
            tolerance=0.0,
            rounds=options.rounds,
            device=options.device,
        )
    harness.write("pack_padded", rows, options)


if __name__ == "__main__":
    main()
