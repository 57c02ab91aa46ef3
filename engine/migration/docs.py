"""The part of docs/migrating.md that is generated from the tables.

    python -m icegrt.migration.docs

writes it to the standard output; it stands between the markers of the page.
"""

from __future__ import annotations

import sys

from icegrt.migration import trl
from icegrt.migration.table import markdown
from icegrt.migration.trl_arguments import TRAINING_ARGUMENTS

BEGIN, END = "<!-- begin: python -m icegrt.migration.docs -->", "<!-- end -->"
_PARTS = (
    ("Batch and length", trl.BATCH),
    ("Algorithm", trl.ALGORITHM),
    ("Models and data", trl.MODELS),
    ("Keys of `TrainingArguments`", TRAINING_ARGUMENTS),
)


def trl_tables() -> str:
    """Return the tables of TRL's keys, markers included."""
    parts = [f"### {title}\n\n{markdown(rows)}\n" for title, rows in _PARTS]
    return "\n".join([BEGIN, "", *parts, END])


if __name__ == "__main__":
    sys.stdout.write(trl_tables() + "\n")
