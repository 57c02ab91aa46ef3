"""`icegrt plan`: the memory of a PPO run by phase, whether it fits, and the changes that make it fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from icegrt.commands.rehearsal_options import Parser, progress, workload_of
from icegrt.errors import ConfigError
from icegrt.planning import report
from icegrt.planning.plan import plan
from icegrt.rehearsal.hardware import PRESETS, Hardware, find_hardware
from icegrt.rollout.memory import parse_memory
from icegrt.utils.files import write_text_atomic

_DECODE_STEPS = 2
_GPU = "h100-80"


def parser() -> Parser:
    """Return the argument parser of `icegrt plan`."""
    plan_parser = Parser(
        "plan",
        "Rehearse a PPO run on the meta device, and report its peaks of device and host memory by phase and kind of "
        "rank, and whether it fits. If it does not, search for the changes that make it fit, and report what each "
        "costs. It needs no GPU, no weights and no data: of each model only config.json is read.",
        _DECODE_STEPS,
    )
    add = plan_parser.add_argument
    add("--gpu-memory", metavar="SIZE", help="memory of a GPU, such as 80GiB (that of --gpu)")
    add("--gpu", default=_GPU, help=f"orders costs: {', '.join(PRESETS)}, or a YAML file of figures ({_GPU})")
    add("--cpu", action="store_true", help="the ranks compute on CPUs; --gpu-memory is what each may take")
    add("--no-search", action="store_true", help="report the configuration alone")
    add("--json", action="store_true", help="print the plan as JSON")
    add("--out", metavar="FILE", help="write the plan as JSON; ppo.memory_plan=FILE lets a run log it beside its peaks")
    return plan_parser


def main(arguments: Sequence[str]) -> None:
    """Run `icegrt plan` with `arguments`.

    Raises:
        UserError: an argument, the configuration or a config.json is wrong.
        SystemExit: after --help.
    """
    args, config = parser().read(arguments)
    hardware = _hardware(args.gpu, args.gpu_memory)
    workload = workload_of(args, config)
    show = progress()
    found = plan(
        config,
        gpus=args.gpus,
        gpus_per_node=args.gpus_per_node,
        hardware=hardware,
        workload=workload,
        on_cpu=args.cpu,
        report=show,
        **({"axes": ()} if args.no_search else {}),
    )
    show("done")
    if args.out:
        write_text_atomic(args.out, report.to_json(found) + "\n")
    if args.json:
        print(report.to_json(found))
    else:
        report.print_plan(found)


def _hardware(name: str, memory: str | None) -> Hardware:
    """Return the GPU, with the memory that is given."""
    hardware = find_hardware(name)
    if memory is None:
        return hardware
    try:
        size = parse_memory(memory)
    except ConfigError:
        size = 0.0
    if size <= 1:
        raise ConfigError(f"--gpu-memory: expected a size such as 80GiB, got {memory!r}")
    return dataclasses.replace(hardware, memory_bytes=size)
