"""value_loss, forward and backward on packed tokens: Triton (on a GPU), reference, eager, torch.compile."""

from __future__ import annotations

import harness
import plots
import sweeps
import torch

from icegrt.kernels import use_backend, value_loss


def plain(value, old, returns):
    bounded = old + (value - old).clamp(-0.2, 0.2)
    return 0.5 * torch.maximum((value - returns) ** 2, (bounded - returns) ** 2).mean()


def ours(backend):
    def run(value, old, returns):
        with use_backend(value_loss=backend):
            return value_loss(value, old, returns, normalizer=float(value.numel())).loss

    return run


def both(call, value, *rest):
    leaf = value.detach().requires_grad_()

    def run():
        leaf.grad = None
        loss = call(leaf, *rest)
        loss.backward()
        return loss.detach()

    return run


def main():
    options = harness.arguments(__doc__)
    rows = []
    for A in (1 << 14, 1 << 17) if options.quick else (1 << 14, 1 << 17, 1 << 20):
        streams = torch.randn(3, A, device=options.device).unbind()
        truth = plain(*(x.double() for x in streams)).item()
        calls = {"reference": ours("reference"), "eager": plain}
        if options.device == "cuda":
            calls["triton"] = ours("triton")
        if options.device == "cuda" or not options.quick:
            calls["torch.compile"] = torch.compile(plain, dynamic=False)
        rows += harness.compare(
            "value_loss",
            f"A{A} both",
            {name: both(call, *streams) for name, call in calls.items()},
            error=lambda out, truth=truth: abs(out.item() - truth),
            tolerance=1e-4,
            rounds=options.rounds,
            device=options.device,
            floor=sweeps.floor_ms(options, traffic=20.0 * A),
        )
    path = harness.write("value_loss", rows, options)
    plots.curves(rows, plots.sizes(rows, "A", "tokens"), path)


if __name__ == "__main__":
    main()
