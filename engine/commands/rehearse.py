"""`icegrt rehearse`: run one PPO iteration on the meta device, and report what it would do on a cluster of GPUs."""

from __future__ import annotations

from collections.abc import Sequence

from icegrt.commands.rehearsal_options import Parser, progress, workload_of
from icegrt.rehearsal import report
from icegrt.rehearsal.hardware import PRESETS, find_hardware
from icegrt.rehearsal.rehearsal import rehearse

_DECODE_STEPS = 8


def parser() -> Parser:
    """Return the argument parser of `icegrt rehearse`."""
    rehearse_parser = Parser(
        "rehearse",
        "Run one PPO iteration of the real engine on the meta device, one rank of each kind, and count what it would "
        "do on GPUs: launches, waits, copies, FLOPs, bytes, collectives, memory, sockets. It needs no GPU, no weights "
        "and no data: of ppo.actor, ppo.reference and ppo.reward_model only config.json is read.",
        _DECODE_STEPS,
    )
    add = rehearse_parser.add_argument
    add("--gpu", required=True, help=f"{', '.join(PRESETS)}, or a YAML file of figures")
    add("--json", action="store_true", help="print the complete report as JSON")
    return rehearse_parser


def main(arguments: Sequence[str]) -> None:
    """Run `icegrt rehearse` with `arguments`.

    Raises:
        UserError: an argument, the configuration or a config.json is wrong.
        SystemExit: after --help.
    """
    args, config = parser().read(arguments)
    hardware = find_hardware(args.gpu)
    workload = workload_of(args, config)
    show = progress()
    rehearsal = rehearse(
        config,
        gpus=args.gpus,
        gpus_per_node=args.gpus_per_node,
        hardware=hardware,
        workload=workload,
        report=show,
    )
    show("done")
    if args.json:
        print(report.to_json(rehearsal))
    else:
        report.print_report(rehearsal)
