"""decode_linear and torch's matrix product on projections of a decode step, whose weights are in no cache."""

import itertools

import torch

from bench import harness, sweeps
from icegrt.kernels import decode_linear, use_backend

# Outputs and width of a projection: the fused MLP and its second layer, of models of width 256, 576 and 4096.
WEIGHTS = {
    "cpu": [(1376, 256), (256, 688), (3072, 576), (576, 1536)],
    "cuda": [(22016, 4096), (4096, 11008)],
}
ROWS = (1, 4, 16, 64, 128)
# Bytes of copies of the weight that are multiplied in turn, as the layers of a model are.
CYCLE_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}


def main() -> None:
    options = harness.arguments(__doc__)
    rows = []
    for dtype, (outputs, width) in itertools.product((torch.float32, torch.bfloat16), WEIGHTS[options.device]):
        for count in ROWS[:2] if options.quick else ROWS:
            rows += case(options, dtype, count, outputs, width)
    harness.write("decode_linear", rows, options)


def case(options, dtype, rows, outputs, width):
    x = torch.randn(rows, width, device=options.device).to(dtype)
    copies = max(1, CYCLE_BYTES[options.device] // (outputs * width * dtype.itemsize))
    weights = torch.randn(copies, outputs, width, device=options.device).to(dtype)
    out = torch.empty(rows, outputs, dtype=dtype, device=options.device)
    truth = x.double() @ weights[-1].double().t()

    def ours(backend):
        with use_backend(backend):
            for weight in weights:
                decode_linear(x, weight, out=out)
        return out

    calls = {"torch": lambda: ours("reference")}
    if options.device == "cpu":
        calls = {"ours": lambda: ours("cpp"), **calls}
    traffic = copies * (weights[0].numel() + x.numel() + out.numel()) * dtype.itemsize
    return harness.compare(
        "decode_linear",
        f"N{rows} M{outputs} K{width} {str(dtype).removeprefix('torch.')}, {copies} weights",
        calls,
        error=lambda result: (result.double() - truth).abs().max().item(),
        tolerance=1.0,  # of sums up to 100, rounded to bf16
        rounds=options.rounds,
        device=options.device,
        floor=sweeps.floor_ms(options, traffic=traffic),
    )


if __name__ == "__main__":
    main()
