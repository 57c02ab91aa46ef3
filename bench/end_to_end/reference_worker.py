"""Iterations of the reference path: `python -m bench.end_to_end.reference_worker WORKLOAD DTYPE ROWS... [--by-length]`.

It runs at the fastest of the batch sizes, ROWS.
"""

from __future__ import annotations

import copy

import torch

from bench.end_to_end.flops import PhaseFlops
from bench.end_to_end.protocol import private_stdout, serve, try_settings
from bench.end_to_end.recipe import ppo_config
from bench.end_to_end.workloads import PAD, worker_parser
from bench.reference_ppo.trainer import ReferencePPO, reward_model_score


def main() -> None:
    """Serve iterations."""
    out = private_stdout()
    parser = worker_parser(__doc__)
    parser.add_argument("rows", nargs="+", type=int, help="sizes of a padded batch to try, in episodes")
    parser.add_argument("--by-length", action="store_true", help="batches of similar lengths in scoring and update")
    options = parser.parse_args()
    workload = options.workload
    actor, reward = workload.actor(), workload.reward_model()
    autocast = torch.bfloat16 if options.dtype == "bf16" else None
    path = ReferencePPO(
        ppo_config(workload, "unused"),
        actor,
        copy.deepcopy(actor),
        copy.deepcopy(reward),
        lambda episodes: reward_model_score(reward, path.rows, PAD, autocast)(episodes),
        pad_id=PAD,
        eos_ids=workload.stop_ids,
        rows=options.rows[0],
        by_length=options.by_length,
        autocast=autocast,
    )
    prompts = workload.prompt_ids()

    def step(counter: PhaseFlops | None = None) -> dict:
        path.on_phase_end = counter.end_phase if counter is not None else None
        result = path.step(prompts)
        return {
            "phases": result.seconds,
            "answer_tokens": sum(len(e.answer) for e in result.episodes),
            "tokens": sum(len(e.prompt) + len(e.answer) for e in result.episodes),
        }

    def count() -> dict:
        with PhaseFlops() as counter:
            figures = step(counter)
        return figures | {"flops": counter.phases, "padding": path.padding_fraction}

    def run(setting: str) -> dict:
        path.rows = settings[setting]
        return step()

    settings = {f"{rows} rows": rows for rows in options.rows}
    seconds = try_settings([*settings], run)
    path.rows = settings[min(seconds, key=seconds.__getitem__)]
    serve(step, out, count, seconds)


if __name__ == "__main__":
    main()
