"""lm_logits, an fp32 copy of the weight, and torch's product of halves, which rounds logits to bf16."""

import torch

from bench import harness, sweeps
from icegrt.kernels import lm_logits

# Rows of a step, vocabulary, hidden size.
SIZES = {
    "cpu": [(n, v, h) for v, h in ((4096, 256), (49152, 576)) for n in (1, 16, 64, 128, 256)],
    "cuda": [(n, 152064, 3584) for n in (64, 256)],
}


def main() -> None:
    options = harness.arguments(__doc__)
    rows = []
    for size in SIZES[options.device][: 3 if options.quick else None]:
        rows += case(options, *size)
    harness.write("lm_logits", rows, options)


def case(options, rows, vocabulary, width):
    hidden = torch.randn(rows, width, device=options.device).bfloat16()
    weight = torch.randn(vocabulary, width, device=options.device).bfloat16()
    out = torch.empty(rows, vocabulary, device=options.device)
    truth = hidden.double() @ weight.double().t()
    calls = {
        "ours": lambda: lm_logits(hidden, weight, out=out),
        "fp32 copy": lambda: torch.mm(hidden.float(), weight.float().t()),
        "halves": lambda: torch.mm(hidden, weight.t()),
    }
    return harness.compare(
        "lm_logits",
        f"N{rows} V{vocabulary} H{width} bfloat16",
        calls,
        error=lambda logits: (logits.double() - truth).abs().max().item(),
        tolerance=1.0,  # of logits up to 100, rounded to bf16
        rounds=options.rounds,
        device=options.device,
        floor=sweeps.floor_ms(options, traffic=2 * weight.numel() + 4 * truth.numel()),
    )


if __name__ == "__main__":
    main()
