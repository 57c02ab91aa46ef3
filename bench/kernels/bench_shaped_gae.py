"""shaped_gae: C++ (CPU), Triton (GPU), the reference, a loop over time, and a scan by blocked matrix products.

The loop is what most trainers do: a dense [N, longest] batch and one step per column. The blocked scan multiplies
128-wide blocks by a triangle of decays and carries from block to block. On the CPU the target of the two large cases is
printed: 20 times the loop and 3 times the blocked scan for 1,000 ragged sequences, 500 times the loop for 10 long ones.
In the cases "decoupled" returns have a lambda of 1; in the cases "turns" the unit is a turn of 100 tokens, with 20
observation tokens between two of them. Their alternatives form advantages and returns, too.
"""

from __future__ import annotations

import functools

import torch

from bench import harness, plots
from icegrt.kernels import shaped_gae, use_backend

KL_COEF, LAM, LAM_VALUE, BLOCK = 0.05, 0.95, 1.0, 128
TURN, OBSERVATION = 100, 20  # tokens
BARS = {"1M ragged": {"loop over time": 20, "blocked matmul": 3}, "1M long": {"loop over time": 500}}


def with_backend(backend):
    def run(score, value, logprob, ref, cu):
        with use_backend(shaped_gae=backend):
            return shaped_gae(score, value, logprob, ref, cu, kl_coef=KL_COEF, lam=LAM).advantage_A

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


def decays(like, lam=LAM):
    power = torch.arange(BLOCK, device=like.device)
    distance = power[:, None] - power
    return torch.where(distance >= 0, lam ** distance.clamp(min=0).to(like.dtype), 0.0)


def blocked_scan(delta, triangle, lam=LAM):
    """A_t = delta_t + lam * A_{t+1} over the last dimension, a multiple of BLOCK."""
    local = (delta.unflatten(1, (-1, BLOCK)) @ triangle).contiguous()
    reach = lam ** torch.arange(BLOCK, 0, -1, device=delta.device, dtype=delta.dtype)
    for block in reversed(range(local.shape[1] - 1)):
        local[:, block] += reach * local[:, block + 1, :1]
    return local.flatten(1)


def blocked_matmul(*streams):
    reward, values, valid_mask = padded(*streams, multiple=BLOCK)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    delta = torch.where(valid_mask, reward + following - values, 0.0)
    return blocked_scan(delta, decays(delta))[valid_mask]


def cases(quick):
    """Quick cases are cases of the whole run, so that their quotients can be compared."""
    generator = torch.Generator().manual_seed(0)
    ragged = {"100k ragged": (100, 2000)} if quick else {"100k ragged": (100, 2000), "1M ragged": (1000, 2000)}
    yield from ((name, torch.randint(1, top + 1, (n,), generator=generator)) for name, (n, top) in ragged.items())
    yield "1 sequence", torch.tensor([100_000])
    if not quick:
        yield "1M long", torch.full((10,), 100_000)
        yield "one-token", torch.ones(100_000, dtype=torch.long)


def turn_mask(cu):
    """True for the tokens of turns, False for observations; every sequence begins with a turn."""
    sequence = torch.repeat_interleave(torch.arange(len(cu) - 1, device=cu.device), cu.diff().long())
    position = torch.arange(len(sequence), device=cu.device) - cu[:-1].long()[sequence]
    return position % (TURN + OBSERVATION) < TURN


def both_of(backend, **options):
    def run(score, value, logprob, ref, cu):
        with use_backend(shaped_gae=backend):
            out = shaped_gae(score, value, logprob, ref, cu, kl_coef=KL_COEF, lam=LAM, lam_value=LAM_VALUE, **options)
        return out.advantage_A, out.return_A

    return run


def loop_with_returns(reward, values, valid_mask):
    """Advantages with LAM and returns with LAM_VALUE of dense batches, by one step per column."""
    advantage, target = torch.zeros_like(values), torch.zeros_like(values)
    carry, other, following = (torch.zeros_like(values[:, 0]) for _ in range(3))
    for t in reversed(range(valid_mask.shape[1])):
        delta = reward[:, t] + following - values[:, t]
        carry = (delta + LAM * carry) * valid_mask[:, t]
        other = (delta + LAM_VALUE * other) * valid_mask[:, t]
        advantage[:, t], target[:, t], following = carry, other, values[:, t]
    return advantage[valid_mask], (target + values)[valid_mask]


def loop_decoupled(*streams):
    return loop_with_returns(*padded(*streams))


def blocked_decoupled(*streams):
    reward, values, valid_mask = padded(*streams, multiple=BLOCK)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    delta = torch.where(valid_mask, reward + following - values, 0.0)
    advantage, target = (blocked_scan(delta, decays(delta, lam), lam)[valid_mask] for lam in (LAM, LAM_VALUE))
    return advantage, target + values[valid_mask]


def loop_over_turns(score, value, logprob, ref, cu, mask):
    # 1. Turns: a run of unmasked tokens of one sequence.
    starts = torch.zeros_like(mask)
    starts[cu[:-1].long()] = True
    first = mask & (starts | ~torch.nn.functional.pad(mask[:-1], (1, 0)))
    turn = (first.cumsum(0) - 1)[mask]
    sequence = torch.repeat_interleave(torch.arange(len(score), device=value.device), cu.diff().long())
    turns_N = sequence[first].bincount(minlength=len(score))
    # 2. Dense batches of turns: rewards are summed, values are those of first tokens.
    valid_mask = torch.arange(int(turns_N.max()), device=value.device) < turns_N[:, None]
    reward, values = (torch.zeros(valid_mask.shape, dtype=value.dtype, device=value.device) for _ in range(2))
    kl = (logprob - ref)[mask]
    reward[valid_mask] = torch.zeros(int(turns_N.sum()), dtype=value.dtype, device=value.device).index_add(
        0, turn, -KL_COEF * kl
    )
    values[valid_mask] = value[first]
    reward[torch.arange(len(score), device=value.device), turns_N - 1] += score
    # 3. Back to tokens.
    advantage, returns = loop_with_returns(reward, values, valid_mask)
    advantage_A, return_A = torch.zeros_like(value), torch.zeros_like(value)
    advantage_A[mask], return_A[first] = advantage[turn], returns
    return advantage_A, return_A


def variants(cu):
    """By the suffix of a case: options of shaped_gae, and the alternatives to its backends."""
    mask = turn_mask(cu)
    return {
        "decoupled": ({}, {"blocked matmul": blocked_decoupled, "loop over time": loop_decoupled}),
        "turns": (
            {"unit": "turn", "mask_A": mask},
            {"loop over turns": functools.partial(loop_over_turns, mask=mask)},
        ),
    }


def relative_error(out, truth):
    """The largest difference of advantages and of returns, each over its largest entry."""
    pairs = [(a.double().cpu(), b.cpu()) for a, b in zip(out, truth, strict=True)]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


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
    """Return the rows of a case's variants."""
    ours, rows = "triton" if options.device == "cuda" else "cpp", []
    for suffix, (keywords, alternatives) in variants(on_device[-1]).items():
        wide = [x.double() if x.is_floating_point() else x for x in on_device]
        truth = both_of("reference", **keywords)(*wide)
        calls = {"reference": both_of("reference", **keywords), **alternatives, "ours": both_of(ours, **keywords)}
        rows += harness.compare(
            "shaped_gae",
            f"{name} {suffix}",
            {key: functools.partial(run, *on_device) for key, run in calls.items()},
            error=lambda out, truth=truth: relative_error(out, truth),
            tolerance=1e-4,
            rounds=options.rounds,
            device=options.device,
            floor=len(on_device[1]) * 24 / 4.3e12 * 1e3 if options.device == "cuda" else None,
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
