"""linear_ppo_loss, forward and backward: ours (all rows, half masked), eager, torch.compile, Liger, bare products.

On a CPU the case A2048 V32000 H512 fp32 is the bar: at most 0.8x the eager reference, 1.15x of three bare products, a
twentieth of the reference's extra memory (gradients that are returned do not count), and 0.55x with half masked.
"""

from __future__ import annotations

import torch

from bench import harness, plots, sweeps
from icegrt.kernels import linear_ppo_loss, use_backend
from icegrt.kernels.linear.products import default_chunk_rows

BAR = (2048, 32000, 512, "cpu")
TIMES = (("cpp", "reference", 0.8), ("cpp", "three products", 1.15), ("cpp, half masked", "cpp", 0.55))


def problem(A, V, H, dtype, device):
    hidden, weight = torch.randn(A, H, device=device).to(dtype), (torch.randn(V, H, device=device) * 0.05).to(dtype)
    labels, advantage = torch.randint(0, V, (A,), device=device), torch.randn(A, device=device)
    logits = hidden.float() @ weight.float().t()
    old = torch.log_softmax(logits, -1).gather(1, labels[:, None]).squeeze(1) + 0.1 * torch.randn(A, device=device)
    return hidden.requires_grad_(), weight.requires_grad_(), labels, old, advantage


def step(backend, streams, chunk_rows=None, mask=None):
    def call(hidden, weight, labels, old, advantage):
        with use_backend("reference" if backend == "reference" else "auto", linear_ppo_loss=backend):
            options = {"normalizer": float(labels.numel()), "mask_A": mask, "chunk_rows": chunk_rows}
            return linear_ppo_loss(hidden, weight, labels, old, advantage, **options).loss

    return both_ways(call, streams)


def plain(hidden, weight, labels, old, advantage):
    logits = sweeps.wide(hidden @ weight.t())
    logp = torch.log_softmax(logits, -1).gather(1, labels[:, None]).squeeze(1)
    ratio = (logp - old).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)).mean()


def both_ways(call, streams):
    def run():
        loss = call(*streams)
        torch.autograd.grad(loss, streams[:2])
        return loss.detach()

    return run


def liger(options, streams):
    """Liger-Kernel's chunked GRPO loss in its per-token form, with gradients in the forward, where it is installed.

    Its chunks are of whole sequences, here of one token each, and get as many rows as ours.
    """
    function = sweeps.peer(options, "liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss", needs_cuda=False)
    if function is None:
        return None
    weight, labels = streams[1:3]
    chunk = sweeps.chunk_rows(options, weight.shape[0]) or default_chunk_rows(weight.shape[0])
    terms = {"beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2, "loss_type": "bnpo"}
    module = function(use_ref_model=False, chunk_size=chunk, **terms)
    ones = torch.ones(labels.numel(), 1, dtype=torch.int64, device=labels.device)

    def call(hidden, weight, labels, old, advantage):
        return module(hidden[:, None], weight, labels[:, None], ones, advantage, old_per_token_logps=old[:, None])[0]

    return both_ways(call, streams)


def products(streams):
    hidden, weight = (x.detach() for x in streams[:2])

    def run():
        z = hidden @ weight.t()
        return z @ weight, z.t() @ hidden

    return run


def providers(options, streams):
    half = torch.arange(streams[2].numel(), device=options.device) % 2 == 0
    rows = sweeps.chunk_rows(options, streams[1].shape[0])
    compiled = "triton" if options.device == "cuda" else "cpp"
    calls = {
        compiled: step(compiled, streams, rows),
        f"{compiled}, half masked": step(compiled, streams, rows, half),
        "chunked": step("chunked", streams, rows),
        "reference": step("reference", streams),
        "eager": both_ways(plain, streams),
        "three products": products(streams),
    }
    if options.device == "cuda" or not options.quick:  # both compile
        calls |= {"liger-kernel": run} if (run := liger(options, streams)) else {}
        calls["torch.compile"] = both_ways(torch.compile(plain, dynamic=False), streams)
    return calls


def print_bar(rows, streams):
    """Print the ratios of the last case beside their targets. Returned gradients do not count as extra memory."""
    last_rows = {row["provider"]: row for row in rows if row["case"] == rows[-1]["case"]}
    returned = sum(x.numel() * x.element_size() for x in streams[:2])
    for name, rival, target in TIMES:
        ratio = last_rows[name]["median"] / last_rows[rival]["median"]
        print(f"{name} / {rival}: {ratio:.2f} of its time, target {target}")
    ours, reference = (last_rows[name]["peak_bytes"] - returned for name in ("cpp", "reference"))
    print(f"cpp / reference: 1/{reference / ours:.1f} of its extra memory, target 1/20")


def main():
    options = harness.arguments(__doc__)
    if options.device == "cuda":
        H, dtype, shapes = 4096, torch.bfloat16, [(2048, 151936), (8192, 151936), (8192, 32000)]
    else:
        H, dtype = 512, torch.float32
        shapes = [(512, 8000)] if options.quick else [(512, 8000), (512, 32000), (512, 64000), (2048, 32000)]
    rows = []
    for A, V in shapes:
        streams = problem(A, V, H, dtype, options.device)
        exact = [x.detach().double() if x.is_floating_point() else x for x in streams]
        truth = plain(*exact).item()
        half = plain(*(x if i == 1 else x[::2] for i, x in enumerate(exact))).item() / 2
        del exact
        rows += harness.compare(
            "linear_ppo_loss",
            f"A{A} V{V} H{H} {str(dtype)[6:]} both",
            providers(options, streams),
            # The bare products have no loss; with half of the actions masked the loss is that of the other half.
            error=lambda out, truth=truth, half=half: (
                0.0 if isinstance(out, tuple) else min(abs(out.item() - truth), abs(out.item() - half))
            ),
            tolerance=1e-2 if dtype == torch.bfloat16 else 1e-4,
            rounds=options.rounds,
            device=options.device,
            floor=sweeps.floor_ms(options, flops=6.0 * A * V * H),
        )
        if (A, V, H, options.device) == BAR:
            print_bar(rows, streams)
    path = harness.write("linear_ppo_loss", rows, options)
    plots.curves(rows, plots.sizes(rows, "A", "actions") | plots.sizes(rows, "V", "vocabulary"), path)


if __name__ == "__main__":
    main()
