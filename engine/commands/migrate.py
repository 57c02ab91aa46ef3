"""`icegrt migrate trl FILE`: a configuration of another library as ours, with a report of what has no equivalent."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from icegrt.config import PPOConfig
from icegrt.errors import ConfigError
from icegrt.migration import trl
from icegrt.migration.table import Finding, Migration, migrate, read_settings
from icegrt.ppo.setup import check_config
from icegrt.utils.files import write_text_atomic

TABLES = {"trl": (trl.ROWS, trl.LIBRARY)}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are `ConfigError`."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"icegrt migrate: {message}; see icegrt migrate --help")


def parser() -> argparse.ArgumentParser:
    """Return the argument parser of `icegrt migrate`."""
    options = _Parser(
        prog="icegrt migrate",
        allow_abbrev=False,
        description="Write the configuration of an icegrt PPO run from that of another library, and report every key "
        "that has no equivalent or means something else. docs/migrating.md has the tables, also for verl, OpenRLHF and "
        "NeMo-RL.",
    )
    add = options.add_argument
    add("library", choices=sorted(TABLES), help="trl: TRL's experimental PPO, 1.0 to 1.10")
    add("config", type=Path, help="YAML file of its keys, or the JSON of PPOConfig.to_json_string()")
    add("--out", type=Path, metavar="FILE", help="write the configuration to this file; default: print it")
    add("--world-size", type=int, metavar="N", help="processes of its run (world_size of the file, or 1)")
    add("--dataset-size", type=int, metavar="N", help="prompts of its data set, if the file counts epochs")
    return options


def main(arguments: Sequence[str]) -> None:
    """Run `icegrt migrate` with `arguments`.

    Raises:
        ConfigError: an argument or the file is wrong, or the result is no valid configuration.
        SystemExit: after --help.
    """
    args = parser().parse_args(list(arguments))
    for name, value in (("--world-size", args.world_size), ("--dataset-size", args.dataset_size)):
        if value is not None and value < 1:
            raise ConfigError(f"icegrt migrate: {name}: expected a whole number above 0, got {value}")
    if args.out is not None and args.out.exists():
        raise ConfigError(f"{args.out}: already there; name another file, or remove it")
    rows, library = TABLES[args.library]
    options = {"dataset_size": args.dataset_size, "world_size": args.world_size}
    settings = read_settings(args.config, rows, library, **options)
    migration = migrate(rows, settings)
    try:
        check_config(PPOConfig(**migration.nested()))
    except ConfigError as error:
        raise ConfigError(f"{args.config}: its run is refused here: {error}") from None
    if args.out is None:
        sys.stdout.write(migration.yaml())
    else:
        try:
            write_text_atomic(args.out, migration.yaml())
        except OSError as error:
            raise ConfigError(f"cannot write {args.out}: {error.strerror}") from error
    print(report(migration, args.out), file=sys.stderr if args.out is None else sys.stdout)


def report(migration: Migration, out: Path | None) -> str:
    """Return what was written, what differs and what has no equivalent, as text."""

    def part(title: str, findings: list[Finding]) -> list[str]:
        return [f"{title}:", *(f"  {finding}" for finding in findings)] if findings else []

    lines = [f"{len(migration.values)} keys converted" + (f": {out}" if out is not None else "")]
    lines += part("converted, but different", migration.different)
    lines += part("no equivalent", migration.missing)
    unset = [f"ppo.{key}" for key in ("actor", "reward_model", "prompts") if not migration.values.get(key)]
    if unset:
        lines.append(f"still to set: {', '.join(unset)} (a reward function serves as well as a reward model)")
    return "\n".join(lines)
