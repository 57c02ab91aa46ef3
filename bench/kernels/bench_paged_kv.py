"""write_kv and copy_blocks: ours, the reference, and an indexed write to a padded contiguous cache."""

import torch

from bench import harness, sweeps
from icegrt.kernels import copy_blocks, use_backend, write_kv

BLOCK = 16
# Rows of a step, key/value heads, elements of a head: decode steps and a chunk of a prompt.
SIZES = {"cpu": ((64, 4, 64), (256, 3, 64), (2048, 4, 64)), "cuda": ((64, 8, 128), (256, 8, 128), (8192, 8, 128))}


def main() -> None:
    options = harness.arguments(__doc__)
    ours = "triton" if options.device == "cuda" else "cpp"
    rows = []
    for size in SIZES[options.device][: 2 if options.quick else None]:
        for dtype in (torch.float32, torch.bfloat16):
            rows += write_case(options, ours, size, dtype)
            rows += copy_case(options, ours, size, dtype)
    harness.write("paged_kv", rows, options)


def write_case(options, ours, size, dtype):
    tokens, groups, width = size
    k, v = (torch.randn(tokens, groups, width, dtype=dtype, device=options.device) for _ in range(2))
    blocks = tokens // BLOCK + 64
    keys, values = (torch.zeros(blocks, groups, BLOCK, width, dtype=dtype, device=options.device) for _ in range(2))
    padded = [torch.zeros(tokens, groups, 8, width, dtype=dtype, device=options.device) for _ in range(2)]
    slots = torch.randperm(blocks * BLOCK)[:tokens].int().to(options.device)
    sequences, offsets = torch.arange(tokens, device=options.device), (slots % 8).long()

    def paged(backend):
        def call():
            with use_backend(backend):
                write_kv(k, v, keys, values, slots)
            return keys

        return call

    def contiguous():
        for cache, new in zip(padded, (k, v), strict=True):
            cache[sequences, :, offsets] = new
        return padded[0]

    def written(cache):
        if cache is keys:
            return cache[slots.long() // BLOCK, :, slots.long() % BLOCK]
        return cache[sequences, :, offsets]

    return harness.compare(
        "paged_kv",
        f"write T{tokens} G{groups} D{width} {str(dtype).removeprefix('torch.')}",
        {"ours": paged(ours), "reference": paged("reference"), "contiguous cache": contiguous},
        error=lambda out: (written(out) - k).abs().max().item(),
        tolerance=0.0,
        rounds=options.rounds,
        device=options.device,
        floor=sweeps.floor_ms(options, traffic=4 * k.numel() * k.element_size()),
    )


def copy_case(options, ours, size, dtype):
    copies, groups, width = size
    copies = min(copies, 256)
    cache = torch.randn(8, 2 * copies, groups, BLOCK, width, device=options.device).to(dtype)
    order = torch.randperm(2 * copies).int().to(options.device)
    source, target = order[:copies], order[copies:]
    expected = cache[:, source.long()]

    def call(backend):
        def run():
            with use_backend(backend):
                copy_blocks(cache, source, target)
            return cache

        return run

    return harness.compare(
        "paged_kv",
        f"copy P8 C{copies} G{groups} D{width} {str(dtype).removeprefix('torch.')}",
        {"ours": call(ours), "reference": call("reference")},
        error=lambda out: (out[:, target.long()] - expected).abs().max().item(),
        tolerance=0.0,
        rounds=options.rounds,
        device=options.device,
        floor=sweeps.floor_ms(options, traffic=2 * expected.numel() * expected.element_size()),
    )


if __name__ == "__main__":
    main()
