"""`icegrt rehearse`: run one PPO iteration on the meta device, and report what it would do on a cluster of GPUs."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from icegrt.config import PPOConfig
from icegrt.errors import ConfigError
from icegrt.rehearsal import report
from icegrt.rehearsal.hardware import PRESETS, find_hardware
from icegrt.rehearsal.prompts import prompt_lengths
from icegrt.rehearsal.rehearsal import rehearse
from icegrt.rehearsal.workload import Lengths, Workload
from icegrt.utils import console

_PROMPT_TOKENS = "512"
_DECODE_STEPS = 8


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"icegrt rehearse: {message}; see icegrt rehearse --help")


def parser() -> argparse.ArgumentParser:
    """Return the argument parser of `icegrt rehearse`."""
    rehearse_parser = _Parser(
        prog="icegrt rehearse",
        description="Run one PPO iteration of the real engine on the meta device, one rank of each kind, and count "
        "what it would do on GPUs: launches, waits, copies, FLOPs, bytes, collectives, memory, sockets. It needs no "
        "GPU, no weights and no data: of ppo.actor, ppo.reference and ppo.reward_model only config.json is read.",
        allow_abbrev=False,
    )
    add = rehearse_parser.add_argument
    add("config", nargs="?", help="configuration of the run, a YAML file")
    add("overrides", nargs="*", metavar="ppo.key=VALUE", help="keys that replace those of the file")
    add("--gpus", type=int, required=True, help="ranks of the run")
    add("--gpus-per-node", type=int, default=8, help="GPUs of a node (8)")
    add("--gpu", required=True, help=f"{', '.join(PRESETS)}, or a YAML file of figures")
    add(
        "--prompt-tokens",
        metavar="LENGTHS",
        help=f"tokens of a prompt: a number or uniform:LOW:HIGH ({_PROMPT_TOKENS})",
    )
    add("--prompts", metavar="FILE", help="read the lengths of the prompts from this file, with the actor's tokenizer")
    add(
        "--response-tokens",
        metavar="LENGTHS",
        help="tokens of a response: a number or uniform:LOW:HIGH (ppo.sampling.max_new_tokens)",
    )
    add("--decode-steps", type=int, default=_DECODE_STEPS, help=f"decode steps to rehearse ({_DECODE_STEPS})")
    add("--json", action="store_true", help="print the complete report as JSON")
    return rehearse_parser


def main(arguments: Sequence[str]) -> None:
    """Run `icegrt rehearse` with `arguments`.

    Raises:
        UserError: an argument, the configuration or a config.json is wrong.
        SystemExit: after --help.
    """
    args = parser().parse_intermixed_args(arguments)
    # An override may come first.
    words = [word for word in (args.config, *args.overrides) if word is not None]
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"icegrt rehearse: two configuration files, {files[0]} and {files[1]}; put both into one")
    config = PPOConfig.load(files[0] if files else None, [word for word in words if "=" in word])
    hardware = find_hardware(args.gpu)
    workload = _workload(args, config)
    started = time.monotonic()

    def progress(text: str) -> None:
        if not console.is_quiet():
            print(f"{time.monotonic() - started:6.1f} s  {text}", file=sys.stderr, flush=True)

    rehearsal = rehearse(
        config,
        gpus=args.gpus,
        gpus_per_node=args.gpus_per_node,
        hardware=hardware,
        workload=workload,
        report=progress,
    )
    progress("done")
    if args.json:
        print(report.to_json(rehearsal))
    else:
        report.print_report(rehearsal)


def _workload(args: argparse.Namespace, config: PPOConfig) -> Workload:
    most = config.sampling.max_new_tokens
    responses = Lengths.parse(args.response_tokens or str(most), "--response-tokens")
    if responses.high > most:
        raise ConfigError(f"--response-tokens: {responses.high} is above ppo.sampling.max_new_tokens, {most}")
    if not 1 <= args.decode_steps <= most:
        raise ConfigError(
            f"--decode-steps: expected 1 to ppo.sampling.max_new_tokens ({most}), got {args.decode_steps}"
        )
    count, samples = config.prompts_per_iteration, config.samples_per_prompt
    if args.prompts:
        if args.prompt_tokens:
            raise ConfigError("--prompts and --prompt-tokens both give the lengths of the prompts; give one")
        prompts = prompt_lengths(Path(args.prompts), config, count)
        described = f"prompts from {args.prompts}, {min(prompts)} to {max(prompts)} tokens"
    else:
        lengths = Lengths.parse(args.prompt_tokens or _PROMPT_TOKENS, "--prompt-tokens")
        prompts = lengths.draw(count, config.run.seed)
        described = f"prompts of {lengths} tokens"
    return Workload(
        prompts,
        responses.draw(count * samples, config.run.seed + 1),
        samples,
        args.decode_steps,
        f"{count} {described}, {samples} responses each of {responses} tokens",
    )
