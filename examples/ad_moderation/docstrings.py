"""General data that every machine has: first sentences of the docstrings of Python's standard library.

The sources are parsed, not imported, so that no module's side effects occur. The split is by sentence: libraries repeat
sentences under many names, so a split by name would leak them. The data is deterministic for one version of Python on
one platform.
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

# Tests, demos and copies of other projects do not document the library and repeat sentences.
EXCLUDED = frozenset({"antigravity", "this", "idlelib", "turtle", "turtledemo", "test", "ensurepip", "lib2to3"})
PROMPT_PREFIX = "Document: "
MIN_CHARACTERS, MAX_CHARACTERS = 12, 120
MAX_PROMPT_CHARACTERS = 90

_SENTENCE_END = re.compile(r"(?<=[.!?])\s|\n\s*\n")
_LETTERS = re.compile(r"[^a-z0-9]+")


def first_sentence(docstring: str) -> str | None:
    """Return the first sentence on one line; None if it is too short, too long, not plain text or unfinished."""
    sentence = " ".join(_SENTENCE_END.split(docstring.strip(), maxsplit=1)[0].split())
    is_plain = sentence.isascii() and sentence.isprintable() and sentence[:1].isalpha() and sentence.endswith(".")
    return sentence if is_plain and MIN_CHARACTERS <= len(sentence) <= MAX_CHARACTERS else None


def normalise(sentence: str) -> str:
    """Return the letters and digits of a sentence, the key of the split, which ignores punctuation."""
    return _LETTERS.sub(" ", sentence.lower()).strip()


def _source_files() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    for module in sorted(sys.stdlib_module_names - EXCLUDED):
        if (root / f"{module}.py").is_file():
            yield module, root / f"{module}.py"
        for path in sorted((root / module).rglob("*.py")):
            names = path.relative_to(root).with_suffix("").parts
            if not EXCLUDED.intersection(names) and "tests" not in names:
                yield ".".join(name for name in names if name != "__init__"), path


def _definitions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield (name with arguments, docstring) of a module's functions and classes, in the order of the source."""
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
    """Return all (name, first sentence) pairs. Of equal sentences, the first in alphabetical module order counts."""
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
    """Return train, validation or test (8 : 1 : 1), by a checksum of the normalised sentence."""
    tenth = zlib.crc32(normalise(sentence).encode()) % 10
    return "train" if tenth < 8 else "validation" if tenth == 8 else "test"


def rows(part: str) -> list[dict]:
    """Return all rows of one part: prompt, response, source."""
    return [
        {"prompt": PROMPT_PREFIX + name, "response": sentence, "source": "docstrings"}
        for name, sentence in collect()
        if part_of(sentence) == part
    ]
