"""`icegrt data preview`: what of each row is trained on, as training will see it, in colour on a terminal."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from icegrt.data.conversation import column
from icegrt.data.examples import Example, ExampleEncoder, Prompt, PromptEncoder, SkippedRow, Truncation
from icegrt.data.open import open_rows
from icegrt.data.rankings import Ranking, RankingEncoder
from icegrt.data.rows import RESPONSES, Row
from icegrt.data.tokenizer import load_tokenizer, stop_ids
from icegrt.errors import CheckpointError, ConfigError
from icegrt.utils import console

KINDS = ("examples", "rankings", "prompts")
_NO_LIMIT = 1 << 40
Piece = tuple[str, bool]  # text, and whether it is trained on


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"icegrt data: {message}; see icegrt data --help")


def parser() -> argparse.ArgumentParser:
    """The arguments of `icegrt data`."""
    made = _Parser(prog="icegrt data", description="Look at data as training will see it.", allow_abbrev=False)
    actions = made.add_subparsers(dest="action", required=True, metavar="preview", parser_class=_Parser)
    preview = actions.add_parser(
        "preview",
        allow_abbrev=False,
        help="show what is trained on",
        description="Show the first rows of a file, tokenised and turned into text again: what is trained on stands "
        "out in colour on a terminal, and between [[ and ]] elsewhere.",
    )
    preview.add_argument("file", help="JSONL or Parquet file")
    preview.add_argument(
        "--model",
        "--tokenizer",
        required=True,
        metavar="FOLDER",
        help="checkpoint whose tokenizer is used",
    )
    preview.add_argument("--rows", type=int, default=3, help="rows to show (3)")
    preview.add_argument("--kind", choices=KINDS, help="what the file is read as; told from its first row otherwise")
    preview.add_argument("--input-key", default="", help="column of the prompt where its name is not recognised")
    preview.add_argument("--output-key", default="", help="column of the answer, likewise")
    preview.add_argument("--max-length", type=int, default=_NO_LIMIT, help="longest sequence or prompt in tokens (any)")
    preview.add_argument(
        "--truncation", choices=get_args(Truncation), default="error", help="what becomes of longer ones"
    )
    return made


def main(arguments: Sequence[str]) -> None:
    """Run `icegrt data` with `arguments`. Raises `UserError`, and `SystemExit` after --help."""
    args = parser().parse_args(arguments)
    for name in ("rows", "max_length"):
        if getattr(args, name) < 1:
            raise ConfigError(f"icegrt data preview --{name.replace('_', '-')}: expected 1 or more")
    rows = open_rows(args.file, args.rows, input_key=args.input_key, output_key=args.output_key)
    tokenizer = load_tokenizer(args.model, print_info=console.warn)
    stops = stop_ids(tokenizer, _model_config(Path(args.model)), args.model)
    kind = args.kind or kind_of(rows[0])
    if kind == "prompts":
        if args.truncation == "right":
            raise ConfigError("icegrt data preview --truncation: a prompt is never cut at its end; use left or drop")
        encoder: Any = PromptEncoder(tokenizer, args.max_length, args.truncation)
    else:
        encoder = (ExampleEncoder if kind == "examples" else RankingEncoder)(
            tokenizer, args.max_length, args.truncation, stops
        )
    for row in rows:
        (item,) = encoder([row])
        console.print_info(f"-- {row.where}: {_headline(item)}")
        for pieces in () if isinstance(item, SkippedRow) else shown(tokenizer, item):
            _print(pieces)


def kind_of(row: Row) -> str:
    """What a row's columns look like: "rankings", "examples" or "prompts"."""
    if any(row.get(name) is not None for name in ("responses", "chosen", "rejected")):
        return "rankings"
    return "examples" if row.get("messages") is not None or column(row, RESPONSES) else "prompts"


def shown(tokenizer: Any, item: Example | Prompt | Ranking) -> Iterator[list[Piece]]:
    """The paragraphs of an item, each as pieces of text with whether they are trained on."""
    if isinstance(item, Prompt):
        yield pieces_of(tokenizer, item.tokens, [False] * len(item.tokens))
    elif isinstance(item, Example):
        mask = item.action_mask or [True] * len(item.response)
        yield pieces_of(tokenizer, item.prompt + item.response, [False] * len(item.prompt) + mask)
    else:
        yield pieces_of(tokenizer, item.prompt, [False] * len(item.prompt))
        for score, response in zip(item.scores, item.responses, strict=True):
            yield [(f"{score:g}: ", False), *pieces_of(tokenizer, response, [True] * len(response))]


def pieces_of(tokenizer: Any, tokens: Sequence[int], mask: Sequence[bool]) -> list[Piece]:
    """Tokens as text, special ones included, cut where the mask changes."""
    found: list[Piece] = []
    start = 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or mask[end] != mask[start]:
            found.append((tokenizer.decode(tokens[start:end], skip_special_tokens=False), bool(mask[start])))
            start = end
    return found


def _headline(item: Example | Prompt | Ranking | SkippedRow) -> str:
    if isinstance(item, SkippedRow):
        return f"left out, {item.why}"
    cut = ", cut" if item.truncated else ""
    if isinstance(item, Prompt):
        return f"prompt of {len(item)} tokens{cut}, none trained on"
    if isinstance(item, Example):
        trained = sum(item.action_mask) if item.action_mask is not None else len(item.response)
        return f"{len(item)} tokens{cut}, {trained} trained on"
    return f"prompt of {len(item.prompt)} tokens{cut}, {len(item.responses)} answers by score"


def _print(pieces: list[Piece]) -> None:
    if not console.is_terminal(sys.stdout):
        console.print_info("".join(f"[[{text}]]" if trained else text for text, trained in pieces) + "\n")
        return
    console.styled([(text, "bold green" if trained else "dim") for text, trained in pieces])
    console.print_info()


def _model_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); copy or write it again") from None
