"""The check of a refused command: one short error, no traceback, no new file."""

import json
from collections.abc import Sequence
from pathlib import Path

from icegrt import cli
from tests.helpers.stage_cases import files_under

MAX_LINES = 6
MAX_CHARACTERS = 1500


def check_refused(
    captured,
    watched: Path,
    argv: Sequence[str],
    *words: str | Path,
    max_lines: int = MAX_LINES,
    max_characters: int = MAX_CHARACTERS,
) -> str:
    """Run `icegrt argv`, which must end with exit status 2 and one short error with all `words`; return the error.

    captured: pytest's `capfd` or `capsys`. watched: the folder that must have the same files before and after.
    """
    files_before = files_under(watched)
    captured.readouterr()
    assert cli.main(list(argv)) == 2
    lines = [line for line in captured.readouterr().err.splitlines() if not line.startswith("warning:")]
    text = "\n".join(lines)
    assert text.startswith("error: ") and text.count("error: ") == 1 and "Traceback" not in text, text
    assert len(lines) <= max_lines and len(text) < max_characters, text
    for word in words:
        assert str(word) in text, f"expected {str(word)!r} in: {text}"
    assert files_under(watched) == files_before
    return text


def change_json(path: Path, **changes) -> None:
    """Set keys of a JSON object; `...` removes one."""
    document = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}), encoding="utf-8")
