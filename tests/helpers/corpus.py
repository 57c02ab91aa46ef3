"""How the corpus of bad input is run: one command, one refusal, nothing left behind."""

import json
from collections.abc import Sequence
from pathlib import Path

from icegrt import cli
from tests.helpers import stage_cases as cases

MOST_LINES = 6
MOST_LETTERS = 1500


def refused(captured, watched: Path, argv: Sequence[str], *needles: str | Path) -> str:
    """Run `icegrt argv`, which must end in one short error with all `needles`, no traceback and no new file.

    captured: pytest's `capfd` or `capsys`. `watched` is the folder that must hold afterwards what it held before.
    Returns the error.
    """
    before = cases.files_under(watched)
    captured.readouterr()
    assert cli.main(list(argv)) == 2
    lines = [line for line in captured.readouterr().err.splitlines() if not line.startswith("warning:")]
    text = "\n".join(lines)
    assert text.startswith("error: ") and text.count("error: ") == 1 and "Traceback" not in text, text
    assert len(lines) <= MOST_LINES and len(text) < MOST_LETTERS, text
    for needle in needles:
        assert str(needle) in text, f"expected {str(needle)!r} in: {text}"
    assert cases.files_under(watched) == before
    return text


def change_json(path: Path, **changes) -> None:
    """Set keys of a JSON object; `...` removes one."""
    document = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}), encoding="utf-8")
