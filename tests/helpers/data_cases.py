"""Cases of bad data: a file written from a short description, the command that reads it, the words of the error."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers import stage_cases as stages
from tests.helpers import tiny_models
from tests.helpers.refusals import check_refused

GOOD = {"prompt": "say a", "response": "ok"}
GOOD_RANKING = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 0]}


@dataclass(frozen=True)
class Case:
    """One bad input: the file, the command that must refuse it, and the words of the error.

    make(folder) writes the file and returns its path. In `words` and `keys`, {path} stands for this path.
    """

    name: str
    make: Callable[[Path], Path]
    words: tuple[str, ...]
    command: str = "sft"
    keys: tuple[str, ...] = field(default=())


def text(content: str | bytes, name: str = "bad.jsonl") -> Callable[[Path], Path]:
    """Return a `Case.make` that writes a file of this content."""

    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return make


def lines(*rows: dict | str) -> Callable[[Path], Path]:
    """Return a `Case.make` that writes a JSONL file of these rows; a string is written unchanged."""
    return text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))


def turns(*pairs: tuple[str, object]) -> dict:
    """Return a row of messages from (role, content) pairs."""
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def parquet(columns: dict, name: str = "bad.parquet", damage: Callable[[bytes], bytes] | None = None):
    """Return a `Case.make` that writes a Parquet file of these columns and then damages its bytes."""

    def make(folder: Path) -> Path:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = folder / name
        names, arrays = list(columns), [pa.array(values) for values in columns.values()]
        # Keys of a dict differ by a trailing space where the file gets two columns of one name.
        pq.write_table(pa.Table.from_arrays(arrays, names=[n.strip() for n in names]), path)
        if damage is not None:
            path.write_bytes(damage(path.read_bytes()))
        return path

    return make


def checkpoint(rows: tuple[dict, ...] = (GOOD,), **changes):
    """Return a `Case.make` that writes valid rows and a checkpoint with changed tokenizer attributes."""

    def make(folder: Path) -> Path:
        tokenizer = tiny_models.tokenizer()
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        stages.save_model(folder / "model", tiny_models.causal_lm(), tokenizer)
        return lines(*rows)(folder)

    return make


def arguments(case: Case, home: stages.Home, path: Path, folder: Path) -> list[str]:
    """Return the command line of a small run on the case's file."""
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


def check_case_refused(case: Case, home: stages.Home, folder: Path, capsys) -> None:
    """Run the case: `check_refused`, with at most four lines."""
    path = case.make(folder)
    words = [word.replace("{path}", str(path)) for word in case.words]
    argv = arguments(case, home, path, folder)
    check_refused(capsys, folder, argv, *words, max_lines=4, max_characters=700)
