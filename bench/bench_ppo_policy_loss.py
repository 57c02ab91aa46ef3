"""ppo_policy_loss, forward and backward on packed tokens: Triton (on a GPU), reference, eager, torch.compile."""

from __future__ import annotations

import harness
import plots
import sweeps
import torch

from icegrt.kernels import ppo_policy_loss, use_backend


def plain(logprob, old, advantage):
    ratio = (logprob - old).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)).mean()


def ours(backend):
    def run(logprob, old, advantage):
        with use_backend(ppo_policy_loss=backend):
            return ppo_policy_loss(logprob, old, advantage, normalizer=float(logprob.numel())).loss

    return run


def both(call, logprob, *rest):
    leaf = logprob.detach().requires_grad_()

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
        logprob = torch.randn(A, device=options.device) - 3
        streams = (logprob, logprob + 0.1 * torch.randn_like(logprob), torch.randn_like(logprob))
        truth = plain(*(x.double() for x in streams)).item()
        calls = {"reference": ours("reference"), "eager": plain}
        if options.device == "cuda":
            calls["triton"] = ours("triton")
        if options.device == "cuda" or not options.quick:
            calls["torch.compile"] = torch.compile(plain, dynamic=False)
        rows += harness.compare(
            "ppo_policy_loss",
            f"A{A} both",
            {name: both(call, *streams) for name, call in calls.items()},
            error=lambda out, truth=truth: abs(out.item() - truth),
            tolerance=1e-4,
            rounds=options.rounds,
            device=options.device,
            floor=sweeps.floor_ms(options, traffic=20.0 * A),
        )
    path = harness.write("ppo_policy_loss", rows, options)
    plots.curves(rows, plots.sizes(rows, "A", "tokens"), path)


if __name__ == "__main__":
    main()
