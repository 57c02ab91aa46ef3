"""linear_logprobs, forward and with backward: ours, eager, torch.compile, F.linear_cross_entropy and peers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench import harness, plots, sweeps
from icegrt.kernels import linear_logprobs, use_backend


def with_backend(backend, chunk_rows=None):
    def run(hidden, weight, labels):
        with use_backend(linear_logprobs=backend):
            return linear_logprobs(hidden, weight, labels, chunk_rows=chunk_rows).logprob_A

    return run


def eager(hidden, weight, labels):
    return torch.log_softmax(sweeps.wide(hidden @ weight.t()), -1).gather(1, labels[:, None]).squeeze(1)


def providers(options, V):
    rows = sweeps.chunk_rows(options, V)
    calls = {"chunked": with_backend("chunked", rows), "reference": with_backend("reference"), "eager": eager}
    compiled = "triton" if options.device == "cuda" else "cpp"
    calls[compiled] = with_backend(compiled, rows)
    if options.device == "cuda" or not options.quick:
        calls["torch.compile"] = torch.compile(eager, dynamic=False)
    if hasattr(F, "linear_cross_entropy"):
        calls["F.linear_cross_entropy"] = lambda h, w, y: -F.linear_cross_entropy(h, w, y, reduction="none")
    liger = sweeps.peer(options, "liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    if liger is not None:
        # Only the sum has a gradient there.
        calls["liger-kernel"] = lambda h, w, y: -liger.apply(h, w, y, None, None, -100, 0.0, 0.0, "sum")[0]
    cce = sweeps.peer(options, "cut_cross_entropy", "linear_cross_entropy")
    if cce is not None:
        calls["cut-cross-entropy"] = lambda h, w, y: -cce(h, w, y, reduction="none")
    return calls


def directions(run, hidden, weight, labels):
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]

    def forward():
        with torch.no_grad():
            return run(hidden, weight, labels)

    def both():
        out = run(*leaves, labels)
        torch.autograd.grad(out.sum(), leaves)
        return out.detach()

    return {"forward": forward, "both": both}


def error(out, truth):
    """The worst token's; of a provider that returns the sum alone, the mean one's."""
    return (out - truth).abs().max().item() if out.dim() else abs(out.item() - truth.sum().item()) / len(truth)


def main():
    options = harness.arguments(__doc__)
    if options.device == "cuda":
        H, dtype, shapes = 4096, torch.bfloat16, [(A, 151936) for A in (2048, 8192)] + [(8192, 32000)]
    else:
        H, dtype = 512, torch.float32
        shapes = [(512, 8000)] if options.quick else [(512, 8000), (512, 32000), (512, 64000), (2048, 32000)]
    rows = []
    for A, V in shapes:
        hidden = torch.randn(A, H, device=options.device).to(dtype)
        weight = (torch.randn(V, H, device=options.device) * 0.05).to(dtype)
        labels = torch.randint(0, V, (A,), device=options.device)
        truth = eager(hidden.double(), weight.double(), labels)
        runs = {name: directions(run, hidden, weight, labels) for name, run in providers(options, V).items()}
        for direction, products in (("forward", 1), ("both", 4)):
            rows += harness.compare(
                "linear_logprobs",
                f"A{A} V{V} H{H} {str(dtype)[6:]} {direction}",
                {name: run[direction] for name, run in runs.items()},
                error=lambda out, truth=truth: error(out, truth),
                # Logits that are rounded to bf16, as eager PyTorch's are, are off by 7e-2 and more.
                tolerance=5e-1 if dtype == torch.bfloat16 else 1e-4,
                rounds=options.rounds,
                device=options.device,
                floor=sweeps.floor_ms(options, flops=2.0 * A * V * H * products),
            )
    path = harness.write("linear_logprobs", rows, options)
    both = [row for row in rows if row["case"].endswith("both")]
    plots.curves(both, plots.sizes(both, "A", "actions") | plots.sizes(both, "V", "vocabulary"), path)


if __name__ == "__main__":
    main()
