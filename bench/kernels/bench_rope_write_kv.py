"""rope_write_kv, rope_qkv and write_kv in two calls, and the reference."""

import torch

from bench import harness, sweeps
from icegrt.kernels import rope_qkv, rope_write_kv, use_backend, write_kv

BLOCK = 16
# Rows of a step, key/value heads, queries of a group, elements of a head: decode steps and a chunk of a prompt.
SIZES = {
    "cpu": ((64, 4, 2, 64), (256, 3, 3, 64), (2048, 4, 2, 64)),
    "cuda": ((64, 8, 4, 128), (256, 8, 4, 128), (8192, 8, 4, 128)),
}


def main() -> None:
    options = harness.arguments(__doc__)
    rows = []
    for size in SIZES[options.device][: 2 if options.quick else None]:
        for dtype in (torch.float32, torch.bfloat16):
            rows += case(options, "triton" if options.device == "cuda" else "cpp", size, dtype)
    harness.write("rope_write_kv", rows, options)


def case(options, ours, size, dtype):
    tokens, groups, queries, width = size
    device, blocks = options.device, tokens // BLOCK + 64
    qkv = torch.randn(tokens, groups, queries + 2, width, dtype=dtype, device=device)
    angles = torch.arange(tokens)[:, None] * 10_000.0 ** (-torch.arange(width // 2) / (width // 2))
    cos, sin = angles.cos().to(device), angles.sin().to(device)
    caches = [torch.zeros(blocks, groups, BLOCK, width, dtype=dtype, device=device) for _ in range(2)]
    slots = torch.randperm(blocks * BLOCK)[:tokens].int().to(device)
    out = torch.empty(tokens, groups * queries, width, dtype=dtype, device=device)
    truth = rope_qkv(qkv.double(), cos, sin)

    def fused(backend):
        def call():
            with use_backend(backend):
                return rope_write_kv(qkv, cos, sin, *caches, slots, out=out)

        return call

    def two_calls():
        with use_backend(ours):
            q, k, v = rope_qkv(qkv, cos, sin)
            write_kv(k, v, *caches, slots)
        return q

    def error(q):
        written = [cache[slots.long() // BLOCK, :, slots.long() % BLOCK] for cache in caches]
        return max((a.double() - b).abs().max().item() for a, b in zip((q, *written), truth, strict=True))

    return harness.compare(
        "rope_write_kv",
        f"T{tokens} G{groups} Q{queries} D{width} {str(dtype).removeprefix('torch.')}",
        {"ours": fused(ours), "two calls": two_calls, "reference": fused("reference")},
        error=error,
        tolerance=3e-2 if dtype == torch.bfloat16 else 1e-5,
        rounds=options.rounds,
        device=device,
        floor=sweeps.floor_ms(options, traffic=2 * qkv.numel() * qkv.element_size()),
    )


if __name__ == "__main__":
    main()
