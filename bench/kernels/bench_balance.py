"""Balancing 4096 sequences over 256 bins: ours beside Karmarkar-Karp and a longest-first heap, both in plain Python.

Evenness (fullest bin over the mean one) is stored beside the time: an uneven plan costs more in the step than a fast
one saves here. The alternatives know no token cap, so the bins are wide enough for all of them; ours is run under a
tight cap as well. Every plan is checked before it is timed.
"""

from __future__ import annotations

import heapq

import numpy as np

from bench import harness
from icegrt.packing import balance

N_SEQUENCES, N_BINS = 4096, 256
CASES = {
    "lognormal": lambda rng: np.clip(rng.lognormal(6.5, 1.0, N_SEQUENCES), 1, 16384).astype(np.int64),
    "uniform": lambda rng: rng.integers(1, 4096, N_SEQUENCES),
    "exponential": lambda rng: np.clip(rng.exponential(800, N_SEQUENCES), 1, 8192).astype(np.int64),
}


def heap_longest_first(lengths: list[int], n_bins: int) -> list[list[int]]:
    heap = [(0, b) for b in range(n_bins)]
    bins = [[] for _ in range(n_bins)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total, b = heap[0]
        bins[b].append(i)
        heapq.heapreplace(heap, (total + lengths[i], b))
    return bins


def karmarkar_karp(lengths: list[int], n_bins: int) -> list[list[int]]:
    """Largest differencing: the two most uneven partial partitions merge, heaviest part with lightest, down to one."""
    heap = [(-length, i, [(length, [i])] + [(0, [])] * (n_bins - 1)) for i, length in enumerate(lengths)]
    heapq.heapify(heap)
    while len(heap) > 1:
        _, order, left = heapq.heappop(heap)
        _, _, right = heapq.heappop(heap)
        merged = [(a + b, x + y) for (a, x), (b, y) in zip(left, reversed(right))]
        merged.sort(key=lambda part: -part[0])
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], order, merged))
    return [members for _, members in heap[0][2]]


def icegrt_balance(lengths: np.ndarray, token_budget: int) -> list[tuple[int, ...]]:
    plan = balance(lengths, token_budget=token_budget, ranks=8, round_to=N_BINS // 8)
    return [members for rank in plan.assignments for members in rank]


def misplaced(bins, lengths: np.ndarray) -> float:
    """0.0 for a partition of the sequences over the bins, infinite for anything else."""
    members = sorted(i for one in bins for i in one)
    return 0.0 if len(bins) == N_BINS and members == list(range(len(lengths))) else float("inf")


def totals(bins, lengths: np.ndarray) -> list[int]:
    return [int(lengths[list(members)].sum()) for members in bins]


def measure(case: str, options) -> list[dict]:
    lengths = CASES[case](np.random.default_rng(0))
    listed = lengths.tolist()
    wide, mean = int(lengths.sum()), lengths.sum() / N_BINS
    tight = max(int(lengths.max()), int(mean * 1.001))
    providers = {
        "icegrt": lambda: icegrt_balance(lengths, wide),
        "icegrt tight cap": lambda: icegrt_balance(lengths, tight),
        "heap": lambda: heap_longest_first(listed, N_BINS),
        "Karmarkar-Karp": lambda: karmarkar_karp(listed, N_BINS),
    }
    rows = harness.compare(
        "balance",
        case,
        providers,
        error=lambda bins: misplaced(bins, lengths),
        tolerance=0.0,
        rounds=min(options.rounds, 5),  # Karmarkar-Karp takes seconds
        device=options.device,
    )
    fullest = {name: max(totals(run(), lengths)) for name, run in providers.items()}
    if fullest["icegrt tight cap"] > tight:
        raise SystemExit(f"balance {case}: the cap of {tight} tokens is exceeded: {fullest['icegrt tight cap']}")
    # No plan can be more even than its longest sequence allows.
    floor = max(1.0, int(lengths.max()) / mean)
    for row in list(rows):
        uneven = fullest[row["provider"]] / mean
        print(f"{case:36s} {row['provider']:18s} {uneven:10.5f} fullest bin over mean, {floor:.5f} at best")
        rows.append(row | {"metric": "max_over_mean", "unit": "1", "floor": floor, "runs": 1})
        rows[-1] |= dict.fromkeys(("median", "p20", "p80"), uneven)
    return rows


def main():
    options = harness.arguments(__doc__.splitlines()[0])
    options.device = "cpu"  # host work on every machine
    harness.write("balance", [row for case in CASES for row in measure(case, options)], options)


if __name__ == "__main__":
    main()
