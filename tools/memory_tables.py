"""Write the tables of docs/memory.md: the memory of published models by mode and cluster, each cell rehearsed.

    python tools/memory_tables.py runs/memory.json                       # rehearse what the file lacks
    python tools/memory_tables.py runs/memory.json --write docs/memory.md    # and put the tables between its markers
    python tools/memory_tables.py runs/memory.json --cached --write docs/memory.md    # without new rehearsals

The smallest layout that fits is listed. Rehearsals are saved one by one, so an interrupted run continues.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from icegrt.config import PPOConfig
from icegrt.planning.footprint import device_bytes, host_bytes
from icegrt.planning.plan import plan
from icegrt.rehearsal.hardware import RESERVED, find_hardware
from icegrt.rehearsal.workload import Workload

EXAMPLES = Path("examples/rehearsal")
CONFIG = EXAMPLES / "ppo_memory.yaml"
MODELS = {
    "7B": "llama-2-7b",
    "13B": "llama-2-13b",
    "34B": "codellama-34b",
    "70B": "llama-2-70b",
}
GPUS, MEMORY_GB = (1, 8, 64), (80, 141)
MODES = {
    "resident": [],
    "offload optimizer": ["ppo.offload.roles=optimizer"],
    "offload all": ["ppo.offload.roles=all"],
    "LoRA": ["ppo.sharing=lora", "ppo.critic.init=actor"],
}
# TP x PP, from the least model parallelism to the most; TP stays within a node of 8.
LAYOUTS = ((1, 1), (2, 1), (4, 1), (8, 1), (8, 2), (8, 4))
PROMPT_TOKENS, DECODE_STEPS = 512, 2
MARKERS = "<!-- tables: written by tools/memory_tables.py -->", "<!-- end of tables -->"

Peaks = tuple[int, int]  # bytes of the device and of the host


class Rehearsals:
    """Peaks by configuration, kept in a file.

    Args:
        path: JSON file; it is created.
        cached: what the file lacks is not rehearsed.
    """

    def __init__(self, path: Path, cached: bool = False) -> None:
        self.path, self.cached = path, cached
        self.peaks: dict[str, Peaks] = json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, gpus: int, overrides: list[str]) -> Peaks:
        """Return the largest peaks of all kinds of rank. Raises `LookupError` if they are not rehearsed."""
        key = " ".join([str(gpus), *overrides])
        if key not in self.peaks and self.cached:
            raise LookupError(key)
        if key not in self.peaks:
            started = time.monotonic()
            self.peaks[key] = _rehearse(gpus, overrides)
            self.path.write_text(json.dumps(self.peaks, indent=1))
            device, host = (size / 1e9 for size in self.peaks[key])
            print(f"{time.monotonic() - started:6.1f} s  {key}: {device:.1f} GB, host {host:.1f}", flush=True)
        device, host = self.peaks[key]
        return device, host


def _rehearse(gpus: int, overrides: list[str]) -> Peaks:
    config = PPOConfig.load(CONFIG, overrides)
    count, samples, longest = config.prompts_per_iteration, config.samples_per_prompt, config.sampling.max_new_tokens
    workload = Workload([PROMPT_TOKENS] * count, [longest] * (count * samples), samples, DECODE_STEPS, "fixed")
    found = plan(config, gpus=gpus, gpus_per_node=8, hardware=find_hardware("h100-80"), workload=workload, axes=())
    return device_bytes(found.base.ranks), host_bytes(found.base.ranks)


def cell(rehearsals: Callable[[int, list[str]], Peaks], model: str, mode: str, gpus: int, memory_gb: int) -> str:
    """Return the smallest layout that fits, and its peaks, as text. A larger layout needs less: it is bisected."""
    usable = memory_gb * 1e9 * (1 - RESERVED)
    folder = EXAMPLES / MODELS[model]
    common = [f"ppo.actor={folder}", f"ppo.reward_model={folder}", *MODES[mode]]

    def peaks(layout: tuple[int, int]) -> Peaks:
        tensor, pipeline = layout
        return rehearsals(gpus, [*common, f"ppo.parallel.tensor={tensor}", f"ppo.parallel.pipeline={pipeline}"])

    layouts = [layout for layout in LAYOUTS if layout[0] * layout[1] <= gpus]
    low, high = 0, len(layouts)
    while low < high:
        middle = (low + high) // 2
        if peaks(layouts[middle])[0] <= usable:
            high = middle
        else:
            low = middle + 1
    if low == len(layouts):
        device, _ = peaks(layouts[-1])
        return f"no: {device / 1e9:,.0f}"
    device, host = peaks(layouts[low])
    tensor, pipeline = layouts[low]
    return f"{tensor}x{pipeline}x{gpus // (tensor * pipeline)}: {device / 1e9:.0f} + {host / 1e9:.0f}"


def tables(rehearsals: Callable[[int, list[str]], Peaks]) -> Iterator[str]:
    """Yield the lines of one table for each model."""
    columns = [(gpus, memory) for gpus in GPUS for memory in MEMORY_GB]
    for model, folder in MODELS.items():
        yield from (f"### {model} (`{folder}`)", "")
        yield "| mode | " + " | ".join(f"{gpus} x {memory} GB" for gpus, memory in columns) + " |"
        yield "|---" * (1 + len(columns)) + "|"
        for mode in MODES:
            cells = [_cell_or_gap(rehearsals, model, mode, gpus, memory) for gpus, memory in columns]
            yield f"| {mode} | " + " | ".join(cells) + " |"
        yield ""


def _cell_or_gap(
    rehearsals: Callable[[int, list[str]], Peaks], model: str, mode: str, gpus: int, memory_gb: int
) -> str:
    try:
        return cell(rehearsals, model, mode, gpus, memory_gb)
    except LookupError:
        return "not rehearsed"


def main() -> None:
    """Rehearse, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rehearsals", type=Path, help="JSON file of the rehearsed peaks")
    parser.add_argument("--write", type=Path, help="page whose tables are replaced")
    parser.add_argument("--cached", action="store_true", help="rehearse nothing; cells may be missing")
    args = parser.parse_args()
    lines = "\n".join(tables(Rehearsals(args.rehearsals, args.cached)))
    if args.write is None:
        print(lines)
        return
    page = args.write.read_text(encoding="utf-8")
    start, end = map(re.escape, MARKERS)
    block = f"{MARKERS[0]}\n\n{lines}\n{MARKERS[1]}"
    args.write.write_text(re.sub(f"{start}.*{end}", lambda _: block, page, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
