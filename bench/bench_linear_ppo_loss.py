"""linear_ppo_loss, forward and backward: ours (all rows, half masked), eager, torch.compile, Liger, bare products.

On a CPU the case A2048 V32000 H512 fp32 is the bar: at most 0.8x the eager reference, 1.15x of three bare products, a
twentieth of the reference's extra memory (gradients that are returned do not count), and 0.55x with half masked.
"""

from __future__ import annotations

import harness
import sweeps
import torch

from icegrt.kernels import linear_ppo_loss, use_backend


def problem(A, V, H, dtype, device):
    hidden, weight = torch.randn(A, H, device=device).to(dtype), (torch.randn(V, H, device=device) * 0.05).to(dtype)
    labels, advantage = torch.randint(0, V, (A,), device=device), torch.randn(A, device=device)
    logits = hidden.float() @ weight.float().t()
    old = torch.log_softmax(logits, -1).gather(1, labels[:, None]).squeeze(1) + 0.1 * torch.randn(A, device=device)
    return hidden.requires_grad_(), weight.requires_grad_(), labels, old, advantage


def step(backend, streams, mask=None):
    hidden, weight, labels, old, advantage = streams

    def run():
        hidden.grad = weight.grad = None
        with use_backend("reference" if backend == "reference" else "auto", linear_ppo_loss=backend):
            options = {"normalizer": float(labels.numel()), "mask_A": mask}
            loss = linear_ppo_loss(hidden, weight, labels, old, advantage, **options).loss
        loss.backward()
        return loss.detach()

    return run


def plain(hidden, weight, labels, old, advantage):
    logp = torch.log_softmax((hidden @ weight.t()).float(), -1).gather(1, labels[:, None]).squeeze(1)
    ratio = (logp - old).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)).mean()


def eager(call, streams):
    def run():
        streams[0].grad = streams[1].grad = None
        loss = call(*streams)
        loss.backward()
        return loss.detach()

    return run


def liger(streams):
    """Liger-Kernel's chunked GRPO loss in its per-token form, with gradients in the forward, where it is installed."""
    function = sweeps.peer("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    if function is None:
        return None
    labels = streams[2]
    module = function(beta=0.0, epsilon_low=0.2, epsilon_high=0.2, use_ref_model=False, loss_type="bnpo")
    ones = torch.ones(labels.numel(), 1, dtype=torch.int64, device=labels.device)

    def call(hidden, weight, labels, old, advantage):
        return module(hidden[:, None], weight, labels[:, None], ones, advantage, old_per_token_logps=old[:, None])[0]

    return eager(call, streams)


def products(streams):
    hidden, weight = (x.detach() for x in streams[:2])

    def run():
        z = hidden @ weight.t()
        return z @ weight, z.t() @ hidden

    return run


def providers(options, streams):
    half = torch.arange(streams[2].numel(), device=options.device) % 2 == 0
    found = {
        "chunked": step("chunked", streams),
        "chunked, half masked": step("chunked", streams, half),
        "reference": step("reference", streams),
        "eager": eager(plain, streams),
        "three products": products(streams),
    }
    if options.device == "cuda":
        found |= {"triton": step("triton", streams), "triton, half masked": step("triton", streams, half)}
        found |= {"liger-kernel": run} if (run := liger(streams)) else {}
    if options.device == "cuda" or not options.quick:
        found["torch.compile"] = eager(torch.compile(plain, dynamic=False), streams)
    return found


def main():
    options = harness.arguments(__doc__)
    if options.device == "cuda":
        H, dtype, shapes = 4096, torch.bfloat16, [(2048, 151936), (8192, 151936), (8192, 32000)]
    else:
        H, dtype = 512, torch.float32
        shapes = [(256, 32000)] if options.quick else [(512, 32000), (2048, 32000), (2048, 8000), (2048, 64000)]
    rows = []
    for A, V in shapes:
        streams = problem(A, V, H, dtype, options.device)
        truth = plain(*(x.detach().double() if x.is_floating_point() else x for x in streams)).item()
        half = (
            plain(
                *(
                    x.detach().double()[::2]
                    if i != 1 and x.is_floating_point()
                    else x.detach().double()
                    if i == 1
                    else x[::2]
                    for i, x in enumerate(streams)
                )
            ).item()
            / 2
        )
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
    sweeps.plot(rows, harness.write("linear_ppo_loss", rows, options))


if __name__ == "__main__":
    main()
