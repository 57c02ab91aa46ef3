"""The bench of a loss over packed tokens, forward and backward: Triton (on a GPU), reference, eager, torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench import harness, plots, sweeps
from icegrt.kernels import use_backend


def run(
    description: str, operation: Callable, plain: Callable[..., Tensor], draw: Callable[[int, str], tuple[Tensor, ...]]
) -> None:
    """Time `operation`, a public function that takes a normalizer, beside `plain`, the same mean in eager PyTorch.

    draw: returns three [A] fp32 streams on a device; the first gets a gradient.
    """
    options, name = harness.arguments(description), operation.__name__

    def with_backend(backend):
        def call(*streams):
            with use_backend(**{name: backend}):
                return operation(*streams, normalizer=float(streams[0].numel())).loss

        return call

    rows = []
    for A in (1 << 14, 1 << 17) if options.quick else (1 << 14, 1 << 17, 1 << 20):
        streams = draw(A, options.device)
        truth = plain(*(x.double() for x in streams)).item()
        calls = {"reference": with_backend("reference"), "eager": plain}
        if options.device == "cuda":
            calls["triton"] = with_backend("triton")
        if options.device == "cuda" or not options.quick:
            calls["torch.compile"] = torch.compile(plain, dynamic=False)
        rows += harness.compare(
            name,
            f"A{A} both",
            {provider: _both(call, *streams) for provider, call in calls.items()},
            error=lambda out, truth=truth: abs(out.item() - truth),
            tolerance=1e-4,
            rounds=options.rounds,
            device=options.device,
            floor=sweeps.floor_ms(options, traffic=20.0 * A),
        )
    path = harness.write(name, rows, options)
    plots.curves(rows, plots.sizes(rows, "A", "tokens"), path)


def _both(call: Callable, first: Tensor, *constants: Tensor):
    leaf = first.detach().requires_grad_()

    def run_both():
        leaf.grad = None
        loss = call(leaf, *constants)
        loss.backward()
        return loss.detach()

    return run_both
