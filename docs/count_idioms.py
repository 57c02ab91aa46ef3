"""Count private idioms per 1,000 words of prose: one of the measurements of docs/log.md, not a gate.

    python docs/count_idioms.py README.md docs            # pages: text outside code
    python docs/count_idioms.py engine kernels            # sources: docstrings and comments

The number tells an author where to look. A text is not better because a counted word was swapped for another.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

IDIOMS = {
    "says, told, speaks": r"says?|said|tells?|told|speaks?|spoke|hears?|heard|asks?|asked|announces?|wants?",
    "what ...": r"what",
    "where there is": r"where (?:there|it|they|one|none|no|not|a|an)",
    "nobody, whoever, theirs": r"nobody|whoever|everyone|everybody|theirs|ours|mine|whatever|the others?",
}
SKIPPED = {"log.md", "configuration.md"}  # a record of the past, and a page made from the sources


def page_prose(text: str) -> str:
    """Return a Markdown page without code, link targets and formulas."""
    text = re.sub(r"^( *)```.*?^\1```", " ", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^ {4,}\S.*$", " ", text, flags=re.MULTILINE)
    return re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text)


def source_prose(text: str) -> str:
    """Return the docstrings and comments of a Python file."""
    parts = [t.string for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            parts.append(ast.get_docstring(node) or "")
    return re.sub(r"`[^`]*`", " ", "\n".join(parts))


def files_under(names: list[str]) -> list[Path]:
    """Return the pages and sources of files and folders."""
    paths = [Path(name) for name in names]
    files = [f for p in paths for f in ([p] if p.is_file() else sorted([*p.rglob("*.md"), *p.rglob("*.py")]))]
    return [f for f in files if f.name not in SKIPPED and f.resolve() != Path(__file__).resolve()]


def main(names: list[str]) -> None:
    """Print words, idioms per 1,000 words by kind, and the five files with the highest density."""
    words, found, per_file = 0, Counter(), []
    for path in files_under(names):
        text = path.read_text(encoding="utf-8")
        prose = (page_prose if path.suffix == ".md" else source_prose)(text)
        counts = {kind: len(re.findall(rf"\b(?:{p})\b", prose, re.IGNORECASE)) for kind, p in IDIOMS.items()}
        length = len(re.findall(r"[A-Za-z][\w'-]*", prose))
        words, found = words + length, found + Counter(counts)
        if length >= 100:
            per_file.append((1000 * sum(counts.values()) / length, str(path)))
    print(f"{words} words, {1000 * sum(found.values()) / max(words, 1):.1f} idioms per 1,000 words")
    for kind, count in found.most_common():
        print(f"  {1000 * count / max(words, 1):5.1f}  {kind}")
    for density, path in sorted(per_file, reverse=True)[:5]:
        print(f"  {density:5.1f}  {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
