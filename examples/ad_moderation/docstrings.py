"""General data that every machine has: first sentences of the docstrings of Python's standard library.

The sources are parsed, never imported: no module's side effects (antigravity, this, turtle) can happen. The split is by
sentence, not by name: libraries repeat sentences under many names, and a split by name leaks them.
Deterministic for one version of Python on one platform.
"""

import ast
import re
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

# Tests, demos, and copies of other projects say little of the library and repeat themselves.
EXCLUDED = frozenset({"antigravity", "this", "idlelib", "turtle", "turtledemo", "test", "ensurepip", "lib2to3"})
PROMPT_PREFIX = "Document: "
MIN_CHARACTERS, MAX_CHARACTERS = 12, 120
MAX_PROMPT_CHARACTERS = 90

_SENTENCE_END = re.compile(r"(?<=[.!?])\s|\n\s*\n")
_LETTERS = re.compile(r"[^a-z0-9]+")


def first_sentence(docstring: str) -> str | None:
    """The first sentence on one line, or None where it is too short, too long, not plain text or unfinished."""
    sentence = " ".join(_SENTENCE_END.split(docstring.strip(), maxsplit=1)[0].split())
    plain = sentence.isascii() and sentence.isprintable() and sentence[:1].isalpha() and sentence.endswith(".")
    return sentence if plain and MIN_CHARACTERS <= len(sentence) <= MAX_CHARACTERS else None


def normalise(sentence: str) -> str:
    """The key of the split: letters and digits only, so that punctuation makes no second sentence."""
    return _LETTERS.sub(" ", sentence.lower()).strip()


def _source_files() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    for module in sorted(sys.stdlib_module_names - EXCLUDED):
        if (root / f"{module}.py").is_file():
            yield module, root / f"{module}.py"
        for path in sorted((root / module).rglob("*.py")):
            inner = path.relative_to(root).with_suffix("").parts
            if not EXCLUDED.intersection(inner) and "tests" not in inner:
                yield ".".join(part for part in inner if part != "__init__"), path


def _definitions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    """(name with arguments, docstring) of a module's functions and classes, in the order of the source."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        name = f"{prefix}.{node.name}"
        arguments = ""
        if not isinstance(node, ast.ClassDef):
            arguments = "(" + ", ".join(arg.arg for arg in node.args.args if arg.arg not in ("self", "cls")) + ")"
        docstring = ast.get_docstring(node)
        if docstring:
            yield name + arguments, docstring
        yield from _definitions(node, name)


@lru_cache(maxsize=1)
def collect() -> tuple[tuple[str, str], ...]:
    """All (name, first sentence) pairs, one name for each distinct sentence: the first in alphabetical module order."""
    pairs, seen = [], set()
    for module, path in _source_files():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        for name, docstring in _definitions(tree, module):
            sentence = first_sentence(docstring)
            if sentence is None or len(name) > MAX_PROMPT_CHARACTERS or normalise(sentence) in seen:
                continue
            seen.add(normalise(sentence))
            pairs.append((name, sentence))
    if not pairs:
        raise RuntimeError(f"no standard library sources under {sysconfig.get_path('stdlib')!r}: install them")
    return tuple(pairs)


def part_of(sentence: str) -> str:
    """train, validation or test (8 : 1 : 1), by a checksum of the normalised sentence."""
    tenth = zlib.crc32(normalise(sentence).encode()) % 10
    return "train" if tenth < 8 else "validation" if tenth == 8 else "test"


def rows(part: str) -> list[dict]:
    """All rows of one part: prompt, response, source."""
    return [
        {"prompt": PROMPT_PREFIX + name, "response": sentence, "source": "docstrings"}
        for name, sentence in collect()
        if part_of(sentence) == part
    ]
