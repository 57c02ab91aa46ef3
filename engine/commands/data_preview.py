"""`icegrt data preview`: show rows as training reads them, with the trained tokens highlighted."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, get_args

from icegrt.data.conversation import column
from icegrt.data.examples import Example, ExampleEncoder, Prompt, PromptEncoder, SkippedRow, Truncation
from icegrt.data.open import open_rows
from icegrt.data.rankings import Ranking, RankingEncoder
from icegrt.data.rows import RESPONSES, Row
from icegrt.data.tokenizer import load_tokenizer, stop_ids
from icegrt.errors import ConfigError
from icegrt.utils import console
from icegrt.utils.files import model_folder, read_object

KINDS = ("examples", "rankings", "prompts")
_NO_LIMIT = 1 << 40
Piece = tuple[str, bool]  # text, and whether training has loss on it


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"icegrt data: {message}; see icegrt data --help")


def parser() -> argparse.ArgumentParser:
    """Return the argument parser of `icegrt data`."""
    data = _Parser(prog="icegrt data", description="Look at data as training reads it.", allow_abbrev=False)
    actions = data.add_subparsers(dest="action", required=True, metavar="preview", parser_class=_Parser)
    preview = actions.add_parser(
        "preview",
        allow_abbrev=False,
        help="show which text training has loss on",
        description="Tokenize the first rows of a file and decode them again. Text with loss is coloured on a "
        "terminal and stands between [[ and ]] elsewhere.",
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
    preview.add_argument("--kind", choices=KINDS, help="type of the rows (default: by the columns of the first row)")
    preview.add_argument("--input-key", default="", help="column of the prompt, if its name is not recognised")
    preview.add_argument("--output-key", default="", help="column of the answer, if its name is not recognised")
    preview.add_argument("--max-length", type=int, default=_NO_LIMIT, help="longest sequence or prompt in tokens (any)")
    preview.add_argument("--truncation", choices=get_args(Truncation), default="error", help="treatment of longer rows")
    return data


def main(arguments: Sequence[str]) -> None:
    """Run `icegrt data` with `arguments`.

    Raises:
        UserError: an argument or the data is wrong.
        SystemExit: after --help.
    """
    args = parser().parse_args(arguments)
    for name in ("rows", "max_length"):
        if getattr(args, name) < 1:
            raise ConfigError(f"icegrt data preview --{name.replace('_', '-')}: expected 1 or more")
    rows = open_rows(args.file, args.rows, input_key=args.input_key, output_key=args.output_key)
    tokenizer = load_tokenizer(args.model, print_info=console.warn)
    folder = model_folder(args.model)
    model_config = folder / "config.json"
    stops = stop_ids(tokenizer, read_object(model_config) if model_config.is_file() else {}, folder)
    kind = args.kind or kind_of(rows[0])
    if kind == "prompts":
        if args.truncation == "right":
            raise ConfigError(
                "icegrt data preview --truncation: a prompt is never truncated at its end; use left or drop"
            )
        encoder: Any = PromptEncoder(tokenizer, args.max_length, args.truncation)
    else:
        encoder = (ExampleEncoder if kind == "examples" else RankingEncoder)(
            tokenizer, args.max_length, args.truncation, stops
        )
    for row in rows:
        (item,) = encoder([row])
        console.print_info(f"-- {row.where}: {_headline(item)}")
        for pieces in () if isinstance(item, SkippedRow) else paragraphs(tokenizer, item):
            _print(pieces)


def kind_of(row: Row) -> str:
    """Return the kind that a row's columns suggest: "rankings", "examples" or "prompts"."""
    if any(row.get(name) is not None for name in ("scores", "ranks", "chosen", "rejected")):
        return "rankings"
    messages = row.get("messages")
    is_answered = isinstance(messages, list) and any(
        isinstance(message, dict) and message.get("role") == "assistant" for message in messages
    )
    return "examples" if is_answered or column(row, RESPONSES) else "prompts"


def paragraphs(tokenizer: Any, item: Example | Prompt | Ranking) -> Iterator[list[Piece]]:
    """Yield the paragraphs of an item, each as pieces of text with or without loss."""
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
    """Decode tokens, special ones included, in one piece per run of equal mask values."""
    pieces: list[Piece] = []
    start = 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or mask[end] != mask[start]:
            pieces.append((tokenizer.decode(tokens[start:end], skip_special_tokens=False), bool(mask[start])))
            start = end
    return pieces


def _headline(item: Example | Prompt | Ranking | SkippedRow) -> str:
    if isinstance(item, SkippedRow):
        return f"dropped, {item.reason}"
    truncated = ", truncated" if item.truncated else ""
    if isinstance(item, Prompt):
        return f"prompt of {len(item)} tokens{truncated}, none trained on"
    if isinstance(item, Example):
        trained = sum(item.action_mask) if item.action_mask is not None else len(item.response)
        return f"{len(item)} tokens{truncated}, {trained} trained on"
    return f"prompt of {len(item.prompt)} tokens{truncated}, {len(item.responses)} answers by score"


def _print(pieces: list[Piece]) -> None:
    if not console.is_terminal(sys.stdout):
        console.print_info("".join(f"[[{text}]]" if trained else text for text, trained in pieces) + "\n")
        return
    console.styled([(text, "bold green" if trained else "dim") for text, trained in pieces])
    console.print_info()
