"""shaped_gae: reference, Triton (on a GPU), a padded loop over time in eager PyTorch, and a Python loop over tokens."""

from __future__ import annotations

import harness
import torch

from icegrt.kernels import shaped_gae, use_backend

KL_COEF, LAM = 0.05, 0.95


def with_backend(backend):
    def run(score, value, logprob, ref, cu):
        with use_backend(shaped_gae=backend):
            return shaped_gae(score, value, logprob, ref, cu, kl_coef=KL_COEF, lam=LAM).advantage_A

    return run


def padded_loop(score, value, logprob, ref, cu):
    """What most trainers do: a dense [N, longest] batch and one step per column."""
    lengths = cu.diff().long()
    column = torch.arange(int(lengths.max()), device=value.device)
    live = column < lengths[:, None]
    reward, values = (torch.zeros(live.shape, dtype=value.dtype, device=value.device) for _ in range(2))
    reward[live], values[live] = -KL_COEF * (logprob - ref), value
    reward[torch.arange(len(score), device=value.device), lengths - 1] += score
    advantage = torch.zeros_like(values)
    carry, following = torch.zeros_like(score), torch.zeros_like(score)
    for t in reversed(range(live.shape[1])):
        carry = (reward[:, t] + following - values[:, t] + LAM * carry) * live[:, t]
        advantage[:, t], following = carry, values[:, t]
    return advantage[live]


def python_loop(score, value, logprob, ref, cu):
    """Token by token, in Python floats."""
    score, value, logprob, ref, cu = (x.tolist() for x in (score, value, logprob, ref, cu))
    advantage = [0.0] * len(value)
    for n, last in enumerate(cu[1:]):
        carry = following = 0.0
        for t in range(last - 1, cu[n] - 1, -1):
            reward = -KL_COEF * (logprob[t] - ref[t]) + (score[n] if t == last - 1 else 0.0)
            carry = reward + following - value[t] + LAM * carry
            advantage[t], following = carry, value[t]
    return torch.tensor(advantage, dtype=torch.float64)


def main():
    options = harness.arguments(__doc__)
    cases = [(64, 88), (256, 88)] if options.quick else [(256, 88), (256, 1024), (1024, 1024)]
    rows = []
    for N, longest in cases:
        lengths = torch.randint(1, longest + 1, (N,))
        cu = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()
        streams = [torch.randn(N), *(torch.randn(int(cu[-1])) for _ in range(3))]
        truth = python_loop(*(x.double() for x in streams), cu)
        on_device = [x.to(options.device) for x in (*streams, cu)]
        runs = {"reference": with_backend("reference"), "padded loop": padded_loop, "python loop": python_loop}
        if options.device == "cuda":
            runs["triton"] = with_backend("triton")
        rows += harness.compare(
            "shaped_gae",
            f"N{N} up to {longest}",
            {name: lambda run=run, x=tuple(on_device): run(*x) for name, run in runs.items()},
            error=lambda out, truth=truth: (out.double().cpu() - truth).abs().max().item(),
            tolerance=1e-3,
            rounds=options.rounds,
            device=options.device,
        )
    harness.write("shaped_gae", rows, options)


if __name__ == "__main__":
    main()
