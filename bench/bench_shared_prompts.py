"""Whole PPO iterations with minibatches by response and by prompt, in turn, on a CPU in fp32 and in bf16.

8 prompts of 64 tokens with 4 answers of 64 tokens each; the model of `bench_iteration.py`. By prompt, inference and
update compute the rows of a prompt once. The target is printed: an iteration by prompt is at least 1.2 times as fast.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from bench.bench_iteration import ANSWER, median_quotients, time_in_turn, trainer

PROMPTS, SAMPLES = 8, 4
ARMS = ("response", "prompt")
TARGET = 1.2


def measure(dtype: str, rounds: int) -> None:
    """Print median seconds of an iteration by arm and phase, and the quotients of the arms in each round."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"episodes": PROMPTS * SAMPLES, "samples": SAMPLES, "prompt": (ANSWER, ANSWER)}
        trainers = {by: trainer(Path(folder), dtype, rounds + 1, minibatch_by=by, **sizes) for by in ARMS}
        timings = time_in_turn(trainers, rounds)
    for by, each in timings.items():
        print(f"{dtype} by {by}: {statistics.median(each.seconds):.3f} s  {each.summary}")
    quotients = median_quotients(*(timings[by] for by in ARMS))
    print(
        f"{dtype}: {quotients[0]:.2f} times as fast by prompt, by the processor's time {quotients[1]:.2f} "
        f"(medians of {rounds} pairs; target {TARGET})"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed iterations of each arm")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for dtype in ("fp32", "bf16"):
        measure(dtype, options.rounds)
