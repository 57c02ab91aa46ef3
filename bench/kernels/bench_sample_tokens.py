"""sample_tokens: Triton or C++, the reference, and softmax with multinomial in eager PyTorch and torch.compile.

The rivals draw other tokens from the same distribution, so what is checked is the log-prob of the token that was drawn.
"""

from __future__ import annotations

import functools

import torch

from bench import harness, plots
from icegrt.kernels import sample_tokens, use_backend

TEMPERATURE = 0.8


def with_backend(backend, **options):
    def run(logits, ids, positions):
        with use_backend(sample_tokens=backend):
            return sample_tokens(
                logits, temperature=TEMPERATURE, seed=0, sequence_ids=ids, positions=positions, **options
            )

    return run


def multinomial(logits, ids, positions):
    logp = torch.log_softmax(logits.float() / TEMPERATURE, dim=-1)
    token = torch.multinomial(logp.exp(), 1)
    return token.squeeze(1), logp.gather(1, token).squeeze(1)


def sorted_truncation(logits, ids, positions, top_k, top_p):
    """Sample as generation libraries do: sort, truncate, softmax, multinomial."""
    z, index = torch.sort(logits.float() / TEMPERATURE, dim=-1, descending=True)
    z[:, top_k:] = -torch.inf
    mass = torch.softmax(z, dim=-1)
    logp = torch.log_softmax(z.masked_fill(mass.cumsum(-1) - mass >= top_p, -torch.inf), dim=-1)
    drawn = torch.multinomial(logp.exp(), 1)
    return index.gather(1, drawn).squeeze(1), logp.gather(1, drawn).squeeze(1)


def main():
    options = harness.arguments(__doc__)
    cuda = options.device == "cuda"
    rows = []
    for N, V in (
        [(16, 1000), (128, 4096), (16, 32000)]
        if options.quick or not cuda
        else [(64, 32000), (64, 152064), (512, 152064)]
    ):
        logits = (torch.randn(N, V, device=options.device) * 3).bfloat16()
        coordinates = (torch.arange(N, device=options.device), torch.arange(N, device=options.device))
        exact = torch.log_softmax(logits.double() / TEMPERATURE, dim=-1)
        for case, truncation in (("plain", {}), ("top-k 50, top-p 0.9", {"top_k": 50, "top_p": 0.9})):
            name = f"N{N} V{V} {case}"
            eager = functools.partial(sorted_truncation, **truncation) if truncation else multinomial
            runs = {"reference": with_backend("reference", **truncation), "eager multinomial": eager}
            ours = "triton" if cuda else "cpp"
            runs[ours] = with_backend(ours, **truncation)
            if not options.quick and not truncation:
                runs["torch.compile"] = torch.compile(multinomial)
            truth = exact
            if truncation:
                ordered, index = torch.sort(exact, dim=-1, descending=True, stable=True)
                ordered[:, 50:] = -torch.inf
                mass = torch.softmax(ordered, dim=-1)
                ordered = ordered.masked_fill(mass.cumsum(-1) - mass >= 0.9, -torch.inf)
                truth = torch.empty_like(exact).scatter_(1, index, torch.log_softmax(ordered, dim=-1))
            rows += harness.compare(
                "sample_tokens",
                name,
                {key: functools.partial(run, logits, *coordinates) for key, run in runs.items()},
                error=lambda out, truth=truth: (
                    (out[1] - truth.gather(1, out[0][:, None]).squeeze(1)).abs().max().item()
                ),
                tolerance=1e-3,
                rounds=options.rounds,
                device=options.device,
                floor=logits.numel() * 2 / 4.3e12 * 1e3 if cuda else None,
            )
    path = harness.write("sample_tokens", rows, options)
    plots.curves(rows, plots.sizes(rows, "V", "vocabulary"), path)


if __name__ == "__main__":
    main()
