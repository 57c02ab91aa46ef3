"""What the bad-input tests of data share: a home made once, files written from short descriptions, and the check."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from icegrt import cli
from tests.helpers import stage_cases as stages
from tests.helpers import tiny_models

GOOD = {"prompt": "say a", "response": "ok"}
GOOD_RANKING = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 0]}


@dataclass(frozen=True)
class Case:
    """One bad input: how its file comes about, the command that must refuse it, and what the error must say.

    make(folder) writes what is needed and returns the file; words may hold {path}, the file's path.
    """

    name: str
    make: Callable[[Path], Path]
    words: tuple[str, ...]
    command: str = "sft"
    keys: tuple[str, ...] = field(default=())


def text(content: str | bytes, name: str = "bad.jsonl") -> Callable[[Path], Path]:
    """A file of this content."""

    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return make


def lines(*rows: dict | str) -> Callable[[Path], Path]:
    """A JSONL file of these rows; a string is a line as it stands."""
    return text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))


def turns(*pairs: tuple[str, object]) -> dict:
    """A row of messages."""
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def parquet(columns: dict, name: str = "bad.parquet", damage: Callable[[bytes], bytes] | None = None):
    """A Parquet file of these columns, damaged afterwards."""

    def make(folder: Path) -> Path:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = folder / name
        names, arrays = list(columns), [pa.array(values) for values in columns.values()]
        # A trailing space tells two columns of one name apart in Python alone.
        pq.write_table(pa.Table.from_arrays(arrays, names=[n.strip() for n in names]), path)
        if damage is not None:
            path.write_bytes(damage(path.read_bytes()))
        return path

    return make


def checkpoint(rows: tuple[dict, ...] = (GOOD,), **changes):
    """Good rows beside a checkpoint whose tokenizer has been changed: attributes, or `chat_template`."""

    def make(folder: Path) -> Path:
        tokenizer = tiny_models.tokenizer()
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        stages.save_model(folder / "model", tiny_models.causal_lm(), tokenizer)
        return lines(*rows)(folder)

    return make


def arguments(case: Case, home: stages.Home, path: Path, folder: Path) -> list[str]:
    """The command line that uses the case's file in a small run."""
    model_folder = folder / "model"
    model = str(model_folder) if model_folder.is_dir() else home.actor
    run, out = folder / "out" / "run", folder / "out" / "rows.jsonl"
    source = f"{{path: {path}}}"
    if case.command == "preview":
        return ["data", "preview", str(path), "--model", model, *case.keys]
    run_arguments = {
        "sft": lambda: stages.sft_keys(home, run, f"sft.model={model}", f"sft.data=[{source}]"),
        "reward": lambda: stages.reward_keys(home, run, f"reward.model={model}", f"reward.data=[{source}]"),
        "ppo": lambda: stages.ppo_keys(home, run, f"ppo.actor={model}", f"ppo.prompts={path}"),
        "sample": lambda: [f"sample.model={model}", f"sample.prompts={path}", f"sample.out={out}"],
        "generate": lambda: [f"generate.model={model}", f"generate.prompts={path}", f"generate.out={out}"],
    }[case.command]()
    return [case.command, *run_arguments, *(key.replace("{path}", str(path)) for key in case.keys)]


def check_refused(case: Case, home: stages.Home, folder: Path, capsys) -> None:
    """Run the case: exit status 2, one short error with every word, no traceback, nothing left behind."""
    path = case.make(folder)
    before = stages.files_under(folder)
    capsys.readouterr()
    status = cli.main(arguments(case, home, path, folder))
    captured = capsys.readouterr().err
    error_lines = [line for line in captured.splitlines() if not line.startswith("warning:")]
    message = "\n".join(error_lines)
    assert status == 2, captured
    assert message.startswith("error: ") and message.count("error: ") == 1, message
    assert "Traceback" not in message and len(error_lines) <= 4 and len(message) < 700, message
    for word in case.words:
        expected = word.replace("{path}", str(path))
        assert expected in message, f"expected {expected!r} in: {message}"
    assert stages.files_under(folder) == before
