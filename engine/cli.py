"""The `icegrt` command: parse arguments and configuration, run one stage, and print user errors as one message.

This module parses the arguments itself: overrides, options and the file may come in any order, and an error message
proposes the nearest valid word, which argparse does not do. Stages, torch and rich are imported on use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import importlib
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence

from icegrt.distributed import failure
from icegrt.errors import ConfigError, RunError, UserError, attach_note, note_of
from icegrt.utils import console
from icegrt.utils.collector import collector_paused
from icegrt.utils.redaction import redact_text

COMMANDS = {
    "sft": "fine-tune a base model on instructions",
    "sample": "draw several answers per prompt, ready for ranking",
    "reward": "train a reward model on ranked answers",
    "value": "train a critic for PPO on the returns of a fixed policy",
    "ppo": "train the actor with PPO against the reward",
    "generate": "answer prompts with a model or a run",
    "export": "convert a run's checkpoint to a Hugging Face checkpoint",
    "study": "compare settings over seeds, with contrasts written down before the runs",
    "report": "write the report of a run, also while it goes on",
    "rehearse": "count what a PPO run would do on a cluster of GPUs, without a GPU",
    "plan": "report the memory that a PPO run needs, and the changes that make it fit",
    "migrate": "convert a configuration of TRL's PPO, and report what has no equivalent",
    "data": "show which text of a data file is trained on",
    "doctor": "check the machine and the installed packages",
}
RESUMABLE = ("sft", "reward", "value", "ppo")
# The module of each stage's `run(config)`, imported on use.
STAGE_MODULES = {
    "sft": "icegrt.training.sft",
    "sample": "icegrt.commands.sample",
    "reward": "icegrt.training.reward_model",
    "value": "icegrt.ppo.value",
    "ppo": "icegrt.ppo.trainer",
    "generate": "icegrt.commands.generate",
    "export": "icegrt.commands.export",
    "study": "icegrt.commands.study",
}
_CONFIG_OPTIONS = {"--help": "show this page", "--print-config": "print the resolved configuration as YAML and exit"}
_RESUME = {"--resume": "continue from the last checkpoint in the run's folder"}
# Options that stand for an override of their command.
_OVERRIDES = {
    "--resume": "run.resume=true",
    "--pilot": "stop_after=pilot",
    "--report": "report_only=true",
    "--retry-failed": "retry_failed=true",
    "--amend": "amend=true",
}
_STUDY_OPTIONS = {
    "--pilot": "run the pilot, write the statement of power, and stop",
    "--report": "start no run: write the page from the finished ones",
    "--retry-failed": "run failed runs again",
    "--amend": "accept a study that differs from the frozen one; the page lists what changed",
}
_DOCTOR_OPTIONS = {"--help": "show this page", "--json": "print the checks as JSON"}
# Required packages of the base install and of `icegrt[engine]`, by import name.
_PACKAGES = {"megatron": "megatron-core", "yaml": "pyyaml"} | {
    n: n for n in ("pydantic", "rich", "scipy", "torch", "transformers")
}

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


@dataclasses.dataclass
class Arguments:
    """One parsed command line."""

    command: str
    options: set[str] = dataclasses.field(default_factory=set)
    config: str | None = None
    overrides: list[str] = dataclasses.field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0: done. 1: the doctor found that the engine cannot run here, or a run of a study failed. 2: a user error. 130:
    interrupted.

    Errors other than `UserError` are raised, with their traceback. So is `UserError` if ICEGRT_DEBUG is set.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(argv)
    except KeyboardInterrupt:
        _print_interrupted(argv)
        return INTERRUPTED
    except Exception as error:
        is_user_error = isinstance(error, UserError)
        if not failure.should_report(error):
            return USAGE if is_user_error else FAILED
        if not is_user_error or os.environ.get("ICEGRT_DEBUG", "0") not in ("", "0"):
            if failure.several_ranks():
                print(f"[rank {os.environ['RANK']}] failed:", file=sys.stderr, flush=True)
            if not hasattr(error, "add_note") and note_of(error):  # Python 3.10: the traceback lacks it
                print(note_of(error), file=sys.stderr, flush=True)
            raise
        _print_error(error)
        return USAGE


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        _write(_overview())
        return OK
    if argv[0] in ("-V", "--version"):
        from icegrt import __version__

        _write(f"icegrt {__version__}")
        return OK
    if argv[0] == "data":
        with _required_packages("data"):
            from icegrt.commands import data_preview
        with contextlib.suppress(SystemExit):  # argparse raises it after --help
            data_preview.main(argv[1:])
        return OK
    if argv[0] == "rehearse":
        with _required_packages("rehearse"):
            from icegrt.commands import rehearse
        with contextlib.suppress(SystemExit):  # argparse raises it after --help
            rehearse.main(argv[1:])
        return OK
    if argv[0] == "plan":
        with _required_packages("plan"):
            from icegrt.commands import plan
        with contextlib.suppress(SystemExit):  # argparse raises it after --help
            plan.main(argv[1:])
        return OK
    if argv[0] == "migrate":
        with _required_packages("migrate"):
            from icegrt.commands import migrate
        with contextlib.suppress(SystemExit):  # argparse raises it after --help
            migrate.main(argv[1:])
        return OK
    if argv[0] == "report":
        with _required_packages("report"):
            from icegrt.commands import report
        report.main(argv[1:])
        return OK
    args = parse(argv)
    if "--help" in args.options:
        _print_help(args.command)
        return OK
    if args.command == "doctor":
        from icegrt.commands import doctor

        return doctor.main(as_json="--json" in args.options)
    with _required_packages(args.command), collector_paused():
        from icegrt.config import SECTIONS
        from icegrt.config.loader import as_yaml
    chosen = [text for option, text in _OVERRIDES.items() if option in args.options]
    overrides = [*args.overrides, *(f"{args.command}.{text}" for text in chosen)]
    config = SECTIONS[args.command].load(args.config, overrides)
    if "--print-config" in args.options:
        _write(as_yaml(config).rstrip())
        return OK
    with _required_packages(args.command), collector_paused():
        stage = importlib.import_module(STAGE_MODULES[args.command])
    with failure.exit_on_peer_failure(), _disk_errors_as_run_errors():
        return stage.run(config) or OK


@contextlib.contextmanager
def _disk_errors_as_run_errors() -> Iterator[None]:
    """Raise errors of a full or broken disk as `RunError`, as a traceback would not help the user."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        refusal = RunError(
            f"{where}{error.strerror} while the command was writing; files finished before are complete: make room or "
            "repair the disk, and start it again"
        )
        attach_note(refusal, note_of(error))
        raise refusal from error


def parse(argv: Sequence[str]) -> Arguments:
    """Sort arguments into options, the configuration file and overrides.

    Raises:
        ConfigError: an argument is none of these; the message proposes the nearest valid one.
    """
    args = Arguments(argv[0])
    if args.command not in COMMANDS:
        nearest = difflib.get_close_matches(args.command, COMMANDS, 1)
        hint = f"did you mean `icegrt {nearest[0]}`?" if nearest else f"the commands are {', '.join(COMMANDS)}"
        raise ConfigError(f"`{args.command}` is not a command; {hint}")
    options = _options(args.command)
    for arg in argv[1:]:
        if arg == "-h" or arg in options:
            args.options.add("--help" if arg == "-h" else arg)
        elif arg.startswith("-"):
            raise ConfigError(_unknown_option(arg, args.command, options))
        elif args.command == "doctor":
            raise ConfigError(f"`icegrt doctor` takes no `{arg}`; its options are {', '.join(options)}")
        elif re.match(r"[\w.\[\]-]*=", arg):
            args.overrides.append(arg)
        elif arg.endswith((".yaml", ".yml")):
            if args.config is not None:
                raise ConfigError(f"two configuration files, {args.config} and {arg}; put both into one")
            args.config = arg
        elif re.fullmatch(r"\w+(\.\w+)+", arg) and arg.split(".")[0] in COMMANDS:
            raise ConfigError(f"`{arg}` has no value; write {arg}=VALUE")
        else:
            hint = "a configuration file ends in .yaml or .yml" if os.path.exists(arg) else "see the usage"
            raise ConfigError(f"`{arg}` is neither a configuration file nor {args.command}.key=VALUE; {hint}")
    return args


def _options(command: str) -> dict[str, str]:
    if command == "doctor":
        return _DOCTOR_OPTIONS
    if command == "study":
        return _CONFIG_OPTIONS | _STUDY_OPTIONS
    return _CONFIG_OPTIONS | (_RESUME if command in RESUMABLE else {})


def _unknown_option(arg: str, command: str, options: dict[str, str]) -> str:
    name = arg.lstrip("-")
    if command != "doctor" and ("=" in name or "." in name):
        key = name if name.startswith(f"{command}.") else f"{command}.{name}"
        return f"`{arg}` is not an option; keys are set without dashes: {key}" + ("" if "=" in key else "=VALUE")
    nearest = difflib.get_close_matches(arg, options, 1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"the options are {', '.join(options)}"
    return f"`{arg}` is not an option of `icegrt {command}`; {hint}"


@contextlib.contextmanager
def _required_packages(command: str) -> Iterator[None]:
    """Raise the import error of a missing third-party package as `UserError` with the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in _PACKAGES:
            raise
        raise UserError(
            f"`icegrt {command}` needs {_PACKAGES[name]}, which is not installed; "
            "pip install 'icegrt[engine]' brings it, and `icegrt doctor` shows what else is missing"
        ) from error


def _print_error(error: UserError) -> None:
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f"[rank {rank}] "
    for line in filter(None, (f"{where}error: {redact_text(str(error))}", note_of(error))):
        print(console.plain(line), file=sys.stderr, flush=True)


def _print_interrupted(argv: list[str]) -> None:
    if not console.is_main():
        return
    hint = ""
    if argv and argv[0] in RESUMABLE:
        # `auto` is right whether there is a checkpoint yet or not.
        auto = f"{argv[0]}.run.resume="
        kept = [arg for arg in argv if arg != "--resume" and not arg.startswith(auto)]
        start = "the same torchrun command with" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "run"
        command = shlex.join([*kept, f"{auto}auto"])
        hint = f"; to continue, from the last checkpoint if there is one, {start}: icegrt {command}"
    print(f"interrupted{hint}", file=sys.stderr, flush=True)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        "icegrt: PPO for language models, from a base model to an exported actor",
        "",
        "usage: icegrt COMMAND [CONFIG.yaml] [COMMAND.key=VALUE ...] [--resume]",
        "",
        "commands:",
        *(f"  {name.ljust(width)}  {text}" for name, text in COMMANDS.items()),
        "",
        "examples:",
        "  icegrt ppo recipe.yaml ppo.kl_coef=0.1 ppo.optimizer.lr=1e-4",
        "  torchrun --nproc-per-node 8 -m icegrt ppo recipe.yaml --resume",
        "",
        "`icegrt COMMAND --help` lists every key with its default. `icegrt --version` prints the version.",
        "ICEGRT_QUIET=1 silences progress; ICEGRT_DEBUG=1 adds the traceback to an error.",
    ]
    return "\n".join(lines)


def _print_help(command: str) -> None:
    lines = [f"icegrt {command}: {COMMANDS[command]}", ""]
    if command == "doctor":
        lines += ["usage: icegrt doctor [--json]", ""]
    else:
        resume = " [--resume]" if command in RESUMABLE else ""
        lines += [f"usage: icegrt {command} [CONFIG.yaml] [{command}.key=VALUE ...]{resume} [--print-config]", ""]
    lines += [f"  {option.ljust(14)}  {text}" for option, text in _options(command).items()]
    if command == "doctor":
        _write("\n".join(lines))
        return
    with _required_packages(command):
        from icegrt.config import SECTIONS
        from icegrt.config.docs import help_text
        from icegrt.config.introspect import config_keys
    cls = SECTIONS[command]
    lines += ["", (cls.__doc__ or "").strip(), f"The file holds these keys under `{command}:`.", ""]
    if not console.is_terminal(sys.stdout):
        _write("\n".join([*lines, help_text(cls)]))
        return
    _write("\n".join(lines))
    cells = [
        [r.name, f"{r.type} {r.bounds}".strip(), f"{r.default} {r.unit}".strip(), r.help] for r in config_keys(cls)
    ]
    console.table(["key", "type", "default", "meaning"], cells)


def _write(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader, such as head, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
