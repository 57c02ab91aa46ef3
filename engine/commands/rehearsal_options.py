"""What `icegrt rehearse` and `icegrt plan` read from the command line: the configuration and the lengths."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from icegrt.config import PPOConfig
from icegrt.errors import ConfigError
from icegrt.rehearsal.prompts import prompt_lengths
from icegrt.rehearsal.workload import Lengths, Workload
from icegrt.utils import console

_PROMPT_TOKENS = "512"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `ConfigError`, and which reads no abbreviations.

    Args:
        command: name of the command.
        description: of the command.
        decode_steps: default of --decode-steps.
    """

    def __init__(self, command: str, description: str, decode_steps: int) -> None:
        super().__init__(prog=f"icegrt {command}", description=description, allow_abbrev=False)
        self.command = command
        add = self.add_argument
        add("config", nargs="?", help="configuration of the run, a YAML file")
        add("overrides", nargs="*", metavar="ppo.key=VALUE", help="keys that replace those of the file")
        add("--gpus", type=int, required=True, help="ranks of the run")
        add("--gpus-per-node", type=int, default=8, help="GPUs of a node (8)")
        add(
            "--prompt-tokens",
            metavar="LENGTHS",
            help=f"tokens of a prompt: a number or uniform:LOW:HIGH ({_PROMPT_TOKENS})",
        )
        add("--prompts", metavar="FILE", help="read the prompts' lengths from this file, with the actor's tokenizer")
        add(
            "--response-tokens",
            metavar="LENGTHS",
            help="tokens of a response: a number or uniform:LOW:HIGH (ppo.sampling.max_new_tokens)",
        )
        add("--decode-steps", type=int, default=decode_steps, help=f"decode steps to rehearse ({decode_steps})")

    def error(self, message: str) -> NoReturn:
        """Raise `ConfigError` in place of an exit."""
        raise ConfigError(f"icegrt {self.command}: {message}; see icegrt {self.command} --help")

    def read(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, PPOConfig]:
        """Return the options, and the configuration.

        Raises:
            UserError: an argument or the configuration is wrong.
        """
        args = self.parse_intermixed_args(arguments)
        # An override may come first.
        words = [word for word in (args.config, *args.overrides) if word is not None]
        files = [word for word in words if "=" not in word]
        if len(files) > 1:
            raise ConfigError(
                f"icegrt {self.command}: two configuration files, {files[0]} and {files[1]}; put both into one"
            )
        return args, PPOConfig.load(files[0] if files else None, [word for word in words if "=" in word])


def progress() -> Callable[[str], None]:
    """Return a function that prints a line of progress, with the seconds since now, on stderr."""
    started = time.monotonic()

    def report(text: str) -> None:
        if not console.is_quiet():
            print(f"{time.monotonic() - started:6.1f} s  {text}", file=sys.stderr, flush=True)

    return report


def workload_of(args: Any, config: PPOConfig) -> Workload:
    """Return the lengths that the options name.

    Raises:
        UserError: an option, the prompts file or the tokenizer is wrong.
    """
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
