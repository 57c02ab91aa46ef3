"""kl_divergence, forward and both gradients: Triton (GPU), the reference (eager PyTorch), torch.compile."""

from __future__ import annotations

import functools

import torch

from bench import harness, plots
from icegrt.kernels import kl_divergence, use_backend
from icegrt.kernels.kl_divergence import reference


def both_ways(run, logprob, ref):
    leaf, other = logprob.detach().requires_grad_(), ref.detach().requires_grad_()
    out = run(leaf, other, "k3")
    out.sum().backward()
    return torch.stack([out.detach(), leaf.grad, other.grad])


def with_backend(backend):
    def run(*arguments):
        with use_backend(kl_divergence=backend):
            return kl_divergence(*arguments)

    return run


def main():
    options = harness.arguments(__doc__)
    cuda = options.device == "cuda"
    rows = []
    for A in (10_000, 100_000) if options.quick else (10_000, 100_000, 1_000_000, 10_000_000):
        logprob, ref = -5 * torch.rand(2, A, device=options.device)
        truth = both_ways(reference.kl_divergence, logprob.double(), ref.double())
        runs = {"reference": with_backend("reference")} | ({"triton": with_backend("triton")} if cuda else {})
        if not options.quick:
            runs["torch.compile"] = torch.compile(reference.kl_divergence)
        rows += harness.compare(
            "kl_divergence",
            f"A{A}",
            {name: functools.partial(both_ways, run, logprob, ref) for name, run in runs.items()},
            error=lambda out, truth=truth: (out - truth).abs().max().item(),
            tolerance=1e-3,
            rounds=options.rounds,
            device=options.device,
            floor=A * 32 / 4.3e12 * 1e3 if cuda else None,
        )
    path = harness.write("kl_divergence", rows, options)
    plots.curves(rows, plots.sizes(rows, "A", "tokens"), path)


if __name__ == "__main__":
    main()
