"""masked_moments and whiten: Triton (GPU), the reference, plain masked PyTorch in fp32, torch.compile of that."""

from __future__ import annotations

import functools

import torch

from bench import harness, plots
from icegrt.kernels import masked_moments, use_backend, whiten


def with_backend(backend):
    def run(x, mask):
        with use_backend(masked_moments=backend, whiten=backend):
            return whiten(x, masked_moments(x, mask))

    return run


def plain(x, mask):
    count = mask.sum()
    mean = torch.where(mask, x, 0).sum() / count
    variance = torch.where(mask, (x - mean) ** 2, 0).sum() / count
    return (x - mean) * torch.rsqrt(variance + 1e-8)


def main():
    options = harness.arguments(__doc__)
    cuda = options.device == "cuda"
    rows = []
    for A in (10_000, 100_000) if options.quick else (10_000, 100_000, 1_000_000, 10_000_000):
        x, mask = torch.randn(A, device=options.device) * 3 + 10, torch.rand(A, device=options.device) > 0.3
        truth = plain(x.double(), mask)
        runs = {"reference": with_backend("reference"), "eager fp32": plain}
        if cuda:
            runs["triton"] = with_backend("triton")
        if not options.quick:
            runs["torch.compile"] = torch.compile(plain)
        rows += harness.compare(
            "whitening",
            f"A{A}",
            {name: functools.partial(run, x, mask) for name, run in runs.items()},
            error=lambda out, truth=truth: (out - truth).abs().max().item(),
            tolerance=1e-3,
            rounds=options.rounds,
            device=options.device,
            floor=A * 13 / 4.3e12 * 1e3 if cuda else None,
        )
    path = harness.write("whitening", rows, options)
    plots.curves(rows, plots.sizes(rows, "A", "tokens"), path)


if __name__ == "__main__":
    main()
