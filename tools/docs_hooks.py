"""MkDocs hooks: the site is made of the pages that people read in the repository.

The README becomes the home page and the example's README a page; links are adapted to that. Pictures outside docs/
are copied to the site, and so are the rows of benches, with the page of each device; a link to a device's folder
becomes one to its page. A link to any other file of the repository becomes plain text, as the site has no such page.
Mermaid diagrams are drawn at build time, so a reader needs no network.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import mermaid

from bench.report import history
from bench.report.page import PAGE, page
from bench.rows import devices, load

ROOT = Path(__file__).resolve().parents[1]
# Pages of the site whose source lies outside docs/.
OUTSIDE = {
    "index.md": "README.md",
    "example.md": "examples/ad_moderation/README.md",
    "smollm2.md": "examples/smollm2/README.md",
}
_LINK = re.compile(r"\[([^\[\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^( *)(```+).*?^\1\2 *$", re.DOTALL | re.MULTILINE)


def on_files(files, config):
    """Add the pages and pictures from outside docs/."""
    for uri, source in OUTSIDE.items():
        files.append(File.generated(config, uri, content=(ROOT / source).read_text(encoding="utf-8")))
    for folder in devices():
        for path in sorted(path for path in folder.iterdir() if path.suffix in (".png", ".json", ".csv")):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
        text = page(folder.name, load(folder), history.load())
        files.append(File.generated(config, (folder / PAGE).relative_to(ROOT).as_posix(), content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Adapt the links of a page, and draw its diagrams."""
    uri = page.file.src_uri
    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_text(markdown[end : fence.start()], uri, files), _fence(fence.group())]
        end = fence.end()
    return "".join([*parts, _text(markdown[end:], uri, files)])


def _text(text: str, uri: str, files) -> str:
    # GitHub begins a list without a blank line before it, Python-Markdown does not.
    text = re.sub(r"^(?!\* |\d+\. |\||#)(\S.*)\n(?=(?:\*|\d+\.) )", r"\1\n\n", text, flags=re.MULTILINE)
    return _LINK.sub(lambda match: _link(match, uri, files), text)


def _fence(fence: str) -> str:
    if not fence.startswith("```mermaid\n"):
        return fence
    return mermaid.to_svg(fence.removeprefix("```mermaid\n").removesuffix("```"))


def _link(match: re.Match, uri: str, files) -> str:
    label, target, anchor = match.group(1), match.group(2), match.group(3) or ""
    if ":" in target:
        return match.group()
    source = ROOT / OUTSIDE.get(uri, f"docs/{uri}")
    path = Path(os.path.normpath(source.parent / target))
    if not path.is_relative_to(ROOT) or not path.exists():
        return match.group()  # MkDocs reports it
    name = path.relative_to(ROOT).as_posix()
    site_page = next((site for site, outside in OUTSIDE.items() if outside == name), name.removeprefix("docs/"))
    for found in (site_page, f"{site_page}/{PAGE}"):
        if files.get_file_from_path(found) is not None:
            return f"[{label}]({os.path.relpath(found, os.path.dirname(uri) or '.')}{anchor})"
    return label if label.startswith("`") else f"`{label}`"
