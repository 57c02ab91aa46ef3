"""Part of `make docs`: every public name has a docstring and an entry in the reference.

    python tools/check_docs.py

Public is what `icegrt`, `icegrt.kernels` and `icegrt.packing` list in `__all__`, and of a class its methods and
properties without an underscore, inherited ones of the package included. Sources are read, not imported.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import griffe

PAGES = {"icegrt": "icegrt.md", "icegrt.kernels": "kernels.md", "icegrt.packing": "packing.md"}


def problems(root: Path, pages: dict[str, str] = PAGES) -> list[str]:
    """Return what is missing, one line each.

    Args:
        root: the repository, with the packages below `src/` and the pages below `docs/reference/`.
        pages: for each public module, its page of the reference.
    """
    lines = []
    package = griffe.load(next(iter(pages)), search_paths=[str(root / "src")], docstring_parser="google")
    for module, page in pages.items():
        parent = package.modules_collection[module]
        names = [name for name in parent.exports if not name.startswith("__")]
        for name in names:
            lines += missing_docstrings(public_object(parent, name))
        entries = re.findall(r"^::: ([\w.]+)$", (root / "docs" / "reference" / page).read_text(), re.MULTILINE)
        listed = [entry.rpartition(".")[2] for entry in entries if f"{entry}.".startswith(f"{module}.")]
        lines += [f"docs/reference/{page}: no entry for {module}.{name}" for name in names if name not in listed]
        lines += [f"docs/reference/{page}: {name} is not in {module}.__all__" for name in listed if name not in names]
        lines += [f"docs/reference/{page}: {name} is listed twice" for name in names if listed.count(name) > 1]
    return lines


def public_object(parent: griffe.Module, name: str) -> griffe.Object:
    """Return the function or class behind a public name, if a submodule has the same name too."""
    member = parent.members[name]
    if member.is_module:  # griffe 2.4: the submodule takes the place of the function imported from it
        member = member.members[name]
    return member.final_target if member.is_alias else member


def missing_docstrings(subject: griffe.Object) -> Iterator[str]:
    """Yield a line for a function or class, and for each public method of it, that has no docstring."""
    if not subject.has_docstring:
        yield f"{subject.relative_filepath}:{subject.lineno}: {subject.path} has no docstring"
    if not subject.is_class:
        return
    for name, member in subject.all_members.items():
        method = member.final_target if member.is_alias else member
        is_method = method.is_function or "property" in method.labels
        if is_method and not name.startswith("_") and not method.has_docstring:
            yield f"{method.relative_filepath}:{method.lineno}: {subject.name}.{name} has no docstring"


def main() -> int:
    lines = list(dict.fromkeys(problems(Path(__file__).resolve().parents[1])))
    print(*lines, sep="\n", file=sys.stderr)
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
