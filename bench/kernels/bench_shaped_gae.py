"""shaped_gae: C++ (CPU), Triton (GPU), the reference, a loop over time, and a scan by blocked matrix products.

The loop is what most trainers do: a dense [N, longest] batch and one step per column. The blocked scan multiplies
128-wide blocks by a triangle of decays and carries from block to block. On the CPU the target of the two large cases is
printed: 20 times the loop and 3 times the blocked scan for 1,000 ragged sequences, 500 times the loop for 10 long ones.
The cases "decoupled" and "turns" (of 100 tokens, 20 observation tokens apart) compare our backends alone.
"""

from __future__ import annotations

import functools

import torch

from bench import harness, plots
from icegrt.kernels import shaped_gae, use_backend

KL_COEF, LAM, BLOCK = 0.05, 0.95, 128
BARS = {"1M ragged": {"loop over time": 20, "blocked matmul": 3}, "1M long": {"loop over time": 500}}


def with_backend(backend, **options):
    def run(score, value, logprob, ref, cu):
        with use_backend(shaped_gae=backend):
            return shaped_gae(score, value, logprob, ref, cu, kl_coef=KL_COEF, lam=LAM, **options).advantage_A

    return run


def padded(score, value, logprob, ref, cu, multiple=1):
    """(rewards, values, valid_mask) as dense [N, longest] batches."""
    lengths = cu.diff().long()
    width = -(-int(lengths.max()) // multiple) * multiple
    valid_mask = torch.arange(width, device=value.device) < lengths[:, None]
    reward, values = (torch.zeros(valid_mask.shape, dtype=value.dtype, device=value.device) for _ in range(2))
    reward[valid_mask], values[valid_mask] = -KL_COEF * (logprob - ref), value
    reward[torch.arange(len(score), device=value.device), lengths - 1] += score
    return reward, values, valid_mask


def loop_over_time(*streams):
    reward, values, valid_mask = padded(*streams)
    advantage = torch.zeros_like(values)
    carry, following = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(valid_mask.shape[1])):
        carry = (reward[:, t] + following - values[:, t] + LAM * carry) * valid_mask[:, t]
        advantage[:, t], following = carry, values[:, t]
    return advantage[valid_mask]


def decays(like):
    power = torch.arange(BLOCK, device=like.device)
    distance = power[:, None] - power
    return torch.where(distance >= 0, LAM ** distance.clamp(min=0).to(like.dtype), 0.0)


def blocked_scan(delta, triangle):
    """A_t = delta_t + LAM * A_{t+1} over the last dimension, a multiple of BLOCK."""
    local = (delta.unflatten(1, (-1, BLOCK)) @ triangle).contiguous()
    reach = LAM ** torch.arange(BLOCK, 0, -1, device=delta.device, dtype=delta.dtype)
    for block in reversed(range(local.shape[1] - 1)):
        local[:, block] += reach * local[:, block + 1, :1]
    return local.flatten(1)


def blocked_matmul(*streams):
    reward, values, valid_mask = padded(*streams, multiple=BLOCK)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    delta = torch.where(valid_mask, reward + following - values, 0.0)
    return blocked_scan(delta, decays(delta))[valid_mask]


def cases(quick):
    generator = torch.Generator().manual_seed(0)
    ragged = {"40k ragged": (40, 2000)} if quick else {"100k ragged": (100, 2000), "1M ragged": (1000, 2000)}
    yield from ((name, torch.randint(1, top + 1, (n,), generator=generator)) for name, (n, top) in ragged.items())
    yield from [("20k long", torch.full((2,), 10_000))] if quick else [("1M long", torch.full((10,), 100_000))]
    yield "1 sequence", torch.tensor([20_000 if quick else 100_000])
    yield "one-token", torch.ones(2_000 if quick else 100_000, dtype=torch.long)


def variants(actions, device):
    """Options of shaped_gae by the case's suffix: lambdas of their own for returns, and turns."""
    position = torch.arange(actions, device=device)
    return {
        "decoupled": {"lam_value": 1.0},
        "turns": {"lam_value": 1.0, "unit": "turn", "mask_A": position % 120 < 100},
    }


def providers(options, name):
    calls = {"reference": with_backend("reference"), "blocked matmul": blocked_matmul}
    if name != "1 sequence":
        calls["loop over time"] = loop_over_time
    calls["ours"] = with_backend("triton" if options.device == "cuda" else "cpp")
    if not options.quick and "ragged" in name:
        compiled = torch.compile(blocked_scan, dynamic=False)

        def compiled_matmul(*streams):
            reward, values, valid_mask = padded(*streams, multiple=BLOCK)
            delta = torch.where(valid_mask, reward + torch.nn.functional.pad(values[:, 1:], (0, 1)) - values, 0.0)
            return compiled(delta, decays(delta))[valid_mask]

        calls["torch.compile"] = compiled_matmul
    return calls


def variant_rows(options, name, on_device):
    """Return the rows of a case's variants: ours beside the reference."""
    ours, rows = "triton" if options.device == "cuda" else "cpp", []
    for suffix, keywords in variants(len(on_device[1]), options.device).items():
        wide = [x.double() if x.is_floating_point() else x for x in on_device]
        truth = with_backend("reference", **keywords)(*wide).cpu()
        rows += harness.compare(
            "shaped_gae",
            f"{name} {suffix}",
            {
                key: functools.partial(with_backend(backend, **keywords), *on_device)
                for key, backend in (("reference", "reference"), ("ours", ours))
            },
            error=lambda out, truth=truth: (out.double().cpu() - truth).abs().max().item(),
            tolerance=1e-3,
            rounds=options.rounds,
            device=options.device,
        )
    return rows


def main():
    options = harness.arguments(__doc__)
    rows, sizes = [], {}
    for name, lengths in cases(options.quick):
        cu = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
        streams = [torch.randn(len(lengths)), *(torch.randn(int(cu[-1])) for _ in range(3)), cu]
        truth = with_backend("reference")(*(x.double() if x.is_floating_point() else x for x in streams))
        on_device = [x.to(options.device) for x in streams]
        sizes |= {name: int(cu[-1])} if "ragged" in name else {}
        case_rows = harness.compare(
            "shaped_gae",
            name,
            {key: functools.partial(run, *on_device) for key, run in providers(options, name).items()},
            error=lambda out, truth=truth: (out.double().cpu() - truth).abs().max().item(),
            tolerance=1e-3,
            rounds=min(options.rounds, 5) if "long" in name else options.rounds,  # the loop takes seconds
            device=options.device,
            floor=int(cu[-1]) * 24 / 4.3e12 * 1e3 if options.device == "cuda" else None,
        )
        medians = {row["provider"]: row["median"] for row in case_rows}
        for rival, bar in BARS.get(name, {}).items() if options.device == "cpu" else ():
            print(f"{'':36s} {rival} / ours: {medians[rival] / medians['ours']:.1f}, target {bar}")
        rows += case_rows
        if "ragged" in name:
            rows += variant_rows(options, name, on_device)
    path = harness.write("shaped_gae", rows, options)
    plots.curves(rows, {"tokens in ragged sequences": sizes}, path)


if __name__ == "__main__":
    main()
