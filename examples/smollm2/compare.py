"""Time and memory of two PPO iterations with `sharing: lora` and with `sharing: full`, each in fresh processes.

python examples/smollm2/compare.py --sharing full --out DIR ppo.actor=... ppo.prompts=... (one rank of a run)
"""

import argparse
import json
import resource
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from icegrt import PPOConfig, PPOTrainer
from icegrt.utils.files import write_text_atomic
from staged_run.assessment import read_json
from staged_run.launch import launch

__all__ = ["ITERATIONS", "SHARINGS", "describe", "measure"]

SHARINGS = ("lora", "full")
ITERATIONS = 2
# Whole models take smaller steps than adapters.
FULL_SETTINGS = ("ppo.optimizer.lr=1e-5", "ppo.critic.optimizer.lr=1e-5")
SETTINGS = Path(__file__).resolve().with_name("ppo.yaml")


def measure(out: Path, ranks: int, overrides: list[str]) -> dict[str, dict[str, list[float]]]:
    """Run `ITERATIONS` iterations of each sharing as `ranks` processes. Return what each rank measured.

    Returns:
        By sharing: `seconds` of each iteration (rollout to update), and `peak_gigabytes` of each rank.

    Raises:
        RuntimeError: a rank failed; its message is on the terminal.
    """
    figures = {}
    for sharing in SHARINGS:
        folder = out / sharing
        command = [sys.executable, __file__, "--sharing", sharing, "--out", str(folder), *overrides]
        status = launch(command, ranks)
        if status:
            raise RuntimeError(f"{folder}: the comparison with sharing={sharing} ended with status {status}")
        by_rank = [read_json(folder / f"rank_{rank}.json") for rank in range(ranks)]
        figures[sharing] = {
            "seconds": by_rank[0]["seconds"],
            "peak_gigabytes": [figure["peak_gigabytes"] for figure in by_rank],
        }
    return figures


def describe(figures: dict[str, dict[str, list[float]]]) -> str:
    """Return the comparison as one paragraph."""
    parts = []
    for sharing, figure in figures.items():
        seconds, peaks = figure["seconds"], figure["peak_gigabytes"]
        parts.append(f"{sharing} {seconds[-1]:.1f} s an iteration and {sum(peaks):.1f} GB")
    return (
        f"Two iterations of each sharing with the settings of the run, from the same prompts, in fresh processes: "
        f"{'; '.join(parts)}. Time: the second iteration. Memory: the peak of each process, summed over ranks."
    )


def run_rank(sharing: str, out: Path, overrides: list[str]) -> None:
    """Run the iterations of one rank and write its figures. No checkpoint or model is written."""
    # The last iteration would write a checkpoint, so there is one more, which does not run.
    extra = [f"ppo.sharing={sharing}", f"ppo.iterations={ITERATIONS + 1}", f"ppo.run.dir={out / 'run'}"]
    extra += ["ppo.run.resume=false", "ppo.run.overwrite=true", *(FULL_SETTINGS if sharing == "full" else ())]
    config = PPOConfig.load(SETTINGS, [*overrides, *extra])
    with PPOTrainer(config) as trainer:
        steps = [trainer.step() for _ in range(ITERATIONS)]
        rank = trainer.cluster.rank
        peak = peak_gigabytes(trainer.cluster.device)
    seconds = [sum(step.seconds_by_phase.values()) for step in steps]
    figures = {"seconds": seconds, "peak_gigabytes": peak}
    write_text_atomic(out / f"rank_{rank}.json", json.dumps(figures) + "\n")


def peak_gigabytes(device: torch.device) -> float:
    """Return the peak of this process's memory: what torch allocated on a GPU, or resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # Linux counts kilobytes


def main() -> None:
    """Run the command line of one rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sharing", choices=SHARINGS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    run_rank(arguments.sharing, arguments.out, arguments.overrides)


if __name__ == "__main__":
    main()
