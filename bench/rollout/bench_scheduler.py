"""A steady decode step of the block scheduler (plan and complete), beside a plain Python scheduler of the same step.

Every sequence has a prompt of its own and decodes one token a step; one in 16 takes a new block. The two schedulers
must write the same tokens, positions and lengths, and slots that agree with their own block tables.
"""

from __future__ import annotations

import numpy as np

from bench import harness, plots
from bench.rollout.python_scheduler import PythonScheduler
from icegrt.scheduling import BlockScheduler

BLOCK_SIZE, MAX_LENGTH = 16, 4096
BLOCKS = 100_000
CASES = {f"{count} sequences, {BLOCKS} blocks": (count, BLOCKS) for count in (16, 64, 256, 1000)}
# Microseconds on one core.
TARGET_US = {"1000 sequences, 100000 blocks": 50.0}
REPEATS = 20


class CppSteps:
    """Steps of the block scheduler. Sequences are submitted and prefilled by the constructor."""

    def __init__(self, prompts: list[list[int]], n_blocks: int) -> None:
        count = len(prompts)
        self.scheduler = BlockScheduler(
            n_blocks, BLOCK_SIZE, max_sequences=count, max_length=MAX_LENGTH, token_budget=count * MAX_LENGTH
        )
        for sequence, prompt in enumerate(prompts):
            self.scheduler.submit(sequence, prompt, MAX_LENGTH - len(prompt))
        self.sampled, self.running = np.zeros(count, np.int32), np.zeros(count, bool)
        self.step()

    def step(self):
        plan = self.scheduler.plan()
        self.scheduler.complete(self.sampled, self.running)
        return plan

    def rows(self):
        plan = self.step()
        table = self.scheduler.block_table[plan.table_rows_S]
        return plan.tokens_T, plan.positions_T, plan.lengths_S, plan.cache_slots_T, table


class PythonSteps:
    """The same steps of the plain Python scheduler."""

    def __init__(self, prompts: list[list[int]], n_blocks: int) -> None:
        self.scheduler = PythonScheduler(n_blocks, BLOCK_SIZE, len(prompts), MAX_LENGTH)
        for prompt in prompts:
            self.scheduler.add([*prompt, 0], MAX_LENGTH - len(prompt) - 1)
        self.sampled, self.running = np.zeros(len(prompts), np.int32), np.zeros(len(prompts), bool)

    def step(self):
        self.scheduler.plan()
        self.scheduler.complete(self.sampled, self.running)
        return self.scheduler

    def rows(self):
        done = self.step()
        return done.tokens, done.positions, done.lengths, done.cache_slots, done.block_table


def wrong_entries(rows, expected) -> float:
    """Entries that differ from the plain scheduler, and slots that are not where the block table says."""
    tokens, positions, lengths, slots, table = rows
    wrong = sum(int((a != b).sum()) for a, b in zip((tokens, positions, lengths), expected[:3]))
    blocks = table[np.arange(len(positions)), positions // BLOCK_SIZE]
    return float(wrong + int((slots != blocks * BLOCK_SIZE + positions % BLOCK_SIZE).sum()))


def measure(case: str, options) -> list[dict]:
    count, n_blocks = CASES[case]
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 30_000, int(length)).tolist() for length in rng.integers(64, 512, count)]
    ours, plain = CppSteps(prompts, n_blocks), PythonSteps(prompts, n_blocks)
    wrong = wrong_entries(ours.rows(), plain.rows())
    if wrong:
        raise SystemExit(f"scheduler {case}: {wrong:.0f} entries differ from the plain scheduler")

    def repeat(step):
        def run():
            for _ in range(REPEATS):
                step()
            return 0.0

        return run

    rows = harness.compare(
        "scheduler",
        case,
        {"icegrt": repeat(ours.step), "plain Python": repeat(plain.step)},
        error=float,
        tolerance=0.0,
        rounds=min(options.rounds, 20),
        device=options.device,
    )
    for row in rows:  # of one step
        row |= {key: row[key] / REPEATS for key in ("median", "p20", "p80")}
        if row["provider"] == "icegrt" and case in TARGET_US:
            print(f"{case}: {1000 * row['median']:.1f} us a step, target {TARGET_US[case]:.0f} us")
    return rows


def main():
    options = harness.arguments(__doc__.splitlines()[0])
    options.device = "cpu"  # host work on every machine
    rows = [row for case in CASES for row in measure(case, options)]
    path = harness.write("scheduler", rows, options)
    plots.curves(rows, {"running sequences": {case: count for case, (count, _) in CASES.items()}}, path)


if __name__ == "__main__":
    main()
