"""token_logprobs, forward and backward: ours (also in place), eager, torch.compile, cross_entropy, flash-attn."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench import harness, plots, sweeps
from icegrt.kernels import token_logprobs, use_backend


def plain(logits, labels):
    return torch.log_softmax(logits.float(), dim=-1).gather(1, labels[:, None]).squeeze(1)


def with_backend(backend):
    def run(logits, labels):
        with use_backend(token_logprobs=backend):
            return token_logprobs(logits, labels).logprob_A

    return run


def in_place(logits, labels):
    with use_backend(token_logprobs="triton"):
        return token_logprobs(logits.view_as(logits), labels, inplace_backward=True).logprob_A


def providers(options):
    calls = {"reference": with_backend("reference"), "eager": plain}
    calls["F.cross_entropy"] = lambda logits, labels: -F.cross_entropy(logits.float(), labels, reduction="none")
    if options.device == "cuda":
        calls["triton"] = with_backend("triton")
    flash = sweeps.peer(options, "flash_attn.ops.triton.cross_entropy", "cross_entropy_loss")
    if flash is not None:
        calls["flash-attn"] = lambda logits, labels: -flash(logits, labels)[0]
    if options.device == "cuda" or not options.quick:  # on CPU it needs a C++ compiler and minutes
        calls["torch.compile"] = torch.compile(plain, dynamic=False)
    return calls


def directions(run, logits, labels):
    """(forward, forward and backward) of one provider on the same tensors."""
    leaf = logits.detach().requires_grad_()
    upstream = torch.ones(logits.shape[0], device=logits.device)

    def forward():
        with torch.no_grad():
            return run(logits, labels)

    def both():
        out = run(leaf, labels)
        torch.autograd.grad(out, leaf, upstream)
        return out.detach()

    return {"forward": forward, "both": both}


def main():
    options = harness.arguments(__doc__)
    cuda = options.device == "cuda"
    if cuda:
        shapes = [(2048, 151936), (8192, 32000), (8192, 151936)]
    else:
        shapes = [(256, 1000), (256, 32000)] if options.quick else [(256, 1000), (256, 32000), (1024, 32000)]
    rows = []
    for A, V in shapes:
        for dtype in (torch.bfloat16, torch.float32):
            logits = (torch.randn(A, V, device=options.device) * 3).to(dtype)
            labels = torch.randint(0, V, (A,), device=options.device)
            truth = torch.log_softmax(logits.double(), -1).gather(1, labels[:, None]).squeeze(1)
            runs = {name: directions(run, logits, labels) for name, run in providers(options).items()}
            scratch = torch.empty_like(logits)
            for direction, passes in (("forward", 1), ("both", 3)):
                calls = {name: run[direction] for name, run in runs.items()}
                if cuda and direction == "both":  # its gradient takes the place of its logits: each call needs a copy
                    calls["triton, in place"] = directions(in_place, scratch, labels)["both"]
                rows += harness.compare(
                    "token_logprobs",
                    f"A{A} V{V} {str(dtype)[6:]} {direction}",
                    calls,
                    error=lambda out, truth=truth: (out.double() - truth).abs().max().item(),
                    tolerance=1e-4,
                    rounds=options.rounds,
                    device=options.device,
                    floor=sweeps.floor_ms(options, traffic=passes * logits.numel() * logits.element_size()),
                    prepare={"triton, in place": lambda x=scratch, logits=logits: x.copy_(logits)},
                )
    path = harness.write("token_logprobs", rows, options)
    both = [row for row in rows if row["case"].endswith("float32 both")]
    plots.curves(both, plots.sizes(both, "A", "actions") | plots.sizes(both, "V", "vocabulary"), path)


if __name__ == "__main__":
    main()
