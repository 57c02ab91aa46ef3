"""Iterations of the reference path: `python -m bench.end_to_end.reference_worker WORKLOAD DTYPE ROWS [--by-length]`."""

from __future__ import annotations

import argparse
import copy

import torch

from bench.end_to_end.protocol import private_stdout, serve
from bench.end_to_end.recipe import ppo_config
from bench.end_to_end.workloads import PAD, WORKLOADS
from bench.reference_ppo.trainer import ReferencePPO, reward_model_score


def main() -> None:
    """Serve iterations."""
    out = private_stdout()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("dtype", choices=("fp32", "bf16"))
    parser.add_argument("rows", type=int, help="episodes of a padded batch")
    parser.add_argument("--by-length", action="store_true", help="batches of similar lengths in scoring and update")
    options = parser.parse_args()
    workload = WORKLOADS[options.workload]
    actor, reward = workload.actor(), workload.reward_model()
    path = ReferencePPO(
        ppo_config(workload, "unused"),
        actor,
        copy.deepcopy(actor),
        copy.deepcopy(reward),
        reward_model_score(reward, options.rows, PAD),
        pad_id=PAD,
        eos_ids=workload.stop_ids,
        rows=options.rows,
        by_length=options.by_length,
        autocast=torch.bfloat16 if options.dtype == "bf16" else None,
    )
    prompts = workload.prompt_ids()

    def step() -> dict:
        result = path.step(prompts)
        return {
            "phases": result.seconds,
            "answer_tokens": sum(len(e.answer) for e in result.episodes),
            "tokens": sum(len(e.prompt) + len(e.answer) for e in result.episodes),
        }

    serve(step, out)


if __name__ == "__main__":
    main()
