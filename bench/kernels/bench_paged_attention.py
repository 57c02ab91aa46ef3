"""Decode attention over pages: ours, the reference, and SDPA over a padded contiguous cache with a boolean mask.

The floor is the memory that holds keys and values of the tokens, read once; on a CPU, at the rate that this machine
sums a tensor of 256 MiB.
"""

import time

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench import harness, sweeps
from icegrt.kernels import paged_attention, use_backend

BLOCK, CAPACITY, MEAN = 16, 512, 128
# Query heads, key/value heads, elements of a head: of 256 hidden, of a chat model of 135 million, of 8 billion.
HEADS = {"cpu": {"H256": (4, 4, 64), "135M": (9, 3, 64)}, "cuda": {"8B": (32, 8, 128), "7B": (32, 32, 128)}}
BATCHES = (1, 16, 64, 256)


def main() -> None:
    options = harness.arguments(__doc__)
    rate = None if options.device == "cuda" else bytes_per_ms()
    rows = []
    for name, heads in HEADS[options.device].items():
        for batch in BATCHES[: 2 if options.quick else None]:
            for lengths in ("ragged", "uniform"):
                for dtype in (torch.float32, torch.bfloat16):
                    rows += case(options, name, heads, batch, lengths, dtype, rate)
    harness.write("paged_attention", rows, options)


def case(options, name, heads, batch, kind, dtype, rate):
    """Return the rows of one step: lengths of mean 128 and at most 512, or all of 128."""
    n_heads, groups, width = heads
    lengths = torch.full((batch,), MEAN)
    if kind == "ragged":  # geometric, as long-tailed answers are
        lengths = torch.empty(batch).geometric_(1 / MEAN, generator=torch.Generator().manual_seed(batch))
        lengths = lengths.clamp(1, CAPACITY)
    lengths = lengths.to(options.device, torch.int32)
    blocks, columns = batch * CAPACITY // BLOCK, CAPACITY // BLOCK
    caches = [torch.randn(blocks, groups, BLOCK, width, device=options.device).to(dtype) for _ in range(2)]
    tables = torch.randperm(blocks, device=options.device).view(batch, columns).int()
    q = torch.randn(batch, n_heads, width, device=options.device).to(dtype)
    out = torch.empty_like(q)

    def call(backend):
        def run():
            with use_backend(backend):
                return paged_attention(q, *caches, tables, lengths, max_length=CAPACITY, out=out)

        return run

    # The padded cache has one slot of CAPACITY tokens for a sequence, attended up to the longest length.
    padded = [
        cache[tables.long()].transpose(1, 2).reshape(batch, groups, CAPACITY, width).contiguous() for cache in caches
    ]
    longest = int(lengths.max())
    mask = (torch.arange(longest, device=options.device) < lengths[:, None])[:, None, None]
    keys, values = (cache[:, :, :longest] for cache in padded)

    def sdpa():
        attended = scaled_dot_product_attention(
            q.unsqueeze(2), keys, values, attn_mask=mask, enable_gqa=n_heads != groups
        )
        return attended.squeeze(2)

    wide = (x.double() for x in (q.unsqueeze(2), keys, values))
    truth = scaled_dot_product_attention(*wide, attn_mask=mask, enable_gqa=n_heads != groups).squeeze(2)
    traffic = 2 * int(lengths.sum()) * groups * width * q.element_size()
    span = 2 * batch * longest * groups * width * q.element_size()
    text = f"{name} S{batch} {kind} {str(dtype).removeprefix('torch.')}"
    print(f"{text}: K and V held {traffic / 2**20:.2f} MiB, padded span {span / 2**20:.2f} MiB")
    ours = "triton" if options.device == "cuda" else "cpp"
    return harness.compare(
        "paged_attention",
        text,
        {"ours": call(ours), "reference": call("reference"), "SDPA, padded": sdpa},
        error=lambda result: (result.double() - truth).abs().max().item() / truth.abs().max().item(),
        tolerance=2e-2 if dtype == torch.bfloat16 else 1e-5,
        rounds=options.rounds,
        device=options.device,
        floor=traffic / rate if rate else sweeps.floor_ms(options, traffic=traffic),
    )


def bytes_per_ms() -> float:
    """Return the rate at which the threads of this process read memory: the best of ten sums."""
    x = torch.zeros(64 << 20)
    best = float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        x.sum()
        best = min(best, time.perf_counter() - begin)
    rate = x.numel() * x.element_size() / best / 1e3
    print(f"memory is read at {rate / 1e6:.1f} GB/s")
    return rate


if __name__ == "__main__":
    main()
