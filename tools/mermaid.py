"""Draw Mermaid flowcharts as SVG, for the documentation site: Material loads mermaid.js from a CDN, a site must not.

Supported is what the pages use: `flowchart TD`, nodes `id["label"]` with `<br>` between lines, and arrows
`a --> b`. Any other statement raises ValueError, so a diagram is never drawn wrongly.
"""

from __future__ import annotations

import html
import itertools
import re
from dataclasses import dataclass, field

_NODE = re.compile(r'(\w+)(?:\["([^"]+)"\])?')
_CHARACTER, _LINE, _PADDING = 7.4, 20, 12  # pixels
_GAP_X, _GAP_Y = 24, 34


@dataclass
class Flowchart:
    """Nodes with their lines of text, in the order of their first mention, and the arrows between them."""

    labels: dict[str, list[str]] = field(default_factory=dict)
    arrows: list[tuple[str, str]] = field(default_factory=list)


def parse(source: str) -> Flowchart:
    """Read the text of a flowchart.

    Args:
        source: lines of Mermaid, without the fence.

    Returns:
        The nodes and arrows.

    Raises:
        ValueError: for a statement that is not supported, with its line.
    """
    lines = [line.strip() for line in source.strip().splitlines() if line.strip()]
    if not lines or lines[0] != "flowchart TD":
        raise ValueError(f"a diagram must begin with 'flowchart TD', found {lines[:1]}")
    chart = Flowchart()
    for line in lines[1:]:
        nodes = [_NODE.fullmatch(part.strip()) for part in line.split("-->")]
        if not all(nodes):
            raise ValueError(f"not supported in a diagram: {line!r}")
        for node in nodes:
            name, label = node.groups()
            if label or name not in chart.labels:
                chart.labels[name] = (label or name).split("<br>")
        names = [node.group(1) for node in nodes]
        chart.arrows += itertools.pairwise(names)
    return chart


def to_svg(source: str) -> str:
    """Return the flowchart as one line of SVG, in the colours of the page.

    Nodes stand in rows: a node is one row below the lowest of its predecessors.
    """
    chart = parse(source)
    boxes, width, height = _layout(chart)
    parts = [
        f'<path class="arrow" marker-end="url(#arrow)" d="{_curve(boxes[a], boxes[b])}"/>' for a, b in chart.arrows
    ]
    for name, (x, y, w, h) in boxes.items():
        parts.append(f'<rect x="{x:.0f}" y="{y:.0f}" width="{w:.0f}" height="{h:.0f}" rx="6"/>')
        for number, line in enumerate(chart.labels[name]):
            baseline = y + _PADDING / 2 + _LINE * (number + 0.75)
            parts.append(f'<text x="{x + w / 2:.0f}" y="{baseline:.0f}">{html.escape(line)}</text>')
    head = (
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z"/></marker></defs>'
    )
    text = html.escape("; ".join(" to ".join(" ".join(chart.labels[n]) for n in pair) for pair in chart.arrows))
    return (
        f'<div class="diagram"><svg role="img" aria-label="{text}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}">{head}{"".join(parts)}</svg></div>'
    )


def _layout(chart: Flowchart) -> tuple[dict[str, tuple[float, float, float, float]], float, float]:
    """Return each node's box (x, y, width, height), and the width and height of the drawing."""
    # 1. Rows: the longest path from a node without predecessors.
    row = dict.fromkeys(chart.labels, 0)
    for _ in chart.labels:
        for a, b in chart.arrows:
            row[b] = max(row[b], row[a] + 1)
    if max(row.values()) >= len(chart.labels):
        raise ValueError("a diagram must not have a cycle")
    rows = [[name for name in chart.labels if row[name] == number] for number in range(max(row.values()) + 1)]
    # 2. Sizes.
    sizes = {
        name: (max(map(len, lines)) * _CHARACTER + 2 * _PADDING, len(lines) * _LINE + _PADDING)
        for name, lines in chart.labels.items()
    }
    widths = [sum(sizes[n][0] for n in names) + _GAP_X * (len(names) - 1) for names in rows]
    # 3. Positions: rows from the top, each centred.
    boxes, y = {}, 2.0
    for names, row_width in zip(rows, widths, strict=True):
        x, row_height = 2 + (max(widths) - row_width) / 2, max(sizes[n][1] for n in names)
        for name in names:
            w, h = sizes[name]
            boxes[name] = (x, y + (row_height - h) / 2, w, h)
            x += w + _GAP_X
        y += row_height + _GAP_Y
    return boxes, max(widths) + 4, y - _GAP_Y + 2


def _curve(start: tuple[float, float, float, float], end: tuple[float, float, float, float]) -> str:
    x1, y1 = start[0] + start[2] / 2, start[1] + start[3]
    x2, y2 = end[0] + end[2] / 2, end[1]
    middle = (y1 + y2) / 2
    return f"M{x1:.0f} {y1:.0f}C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} {x2:.0f} {y2:.0f}"
