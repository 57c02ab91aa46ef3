"""The README's section of figures, between two markers, from committed rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.report.headlines import find
from bench.report.page import facts
from bench.rows import RESULTS, Comparison, Row, compared, devices, load, provider_words, quotient_text, significant
from bench.rows import versions as versions_of

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
_NOTE = "<!-- `python -m bench.report --readme` writes this part from bench/results. -->"


def updated(text: str, results: Path = RESULTS) -> str:
    """Return the README's text with the section of the present rows.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"{BEGIN} and {END} must be in the README, once each and in this order")
    return f"{before}{begin}\n{section(results)}\n{end}{after}"


def section(results: Path = RESULTS) -> str:
    """Return a table per device that has a headline, in Markdown."""
    tables = [_table(folder.name, load(folder)) for folder in devices(results)]
    return "\n\n".join([_NOTE, *(table for table in tables if table)] if any(tables) else [_NOTE, "No rows yet."])


def _table(device: str, benches: Mapping[str, Sequence[Row]]) -> str:
    found = find(benches)
    if not found:
        return ""
    used = [row for _, comparison in found for row in (comparison.ours, comparison.other)]
    known = dict(facts(used))
    everything = [comparison for rows in benches.values() for comparison in compared(rows)]
    lost = [comparison for comparison in everything if comparison.quotient < 1]
    clearly = sum(comparison.is_clear for comparison in lost)
    machine = f"{known['machine']}; {known['versions']}; date {known['date']}; commit {known['commit']}"
    lines = [
        f"On `{device}` ({machine}):",
        "",
        "| work | case | icegrt | best alternative | icegrt is this many times as fast | runs | threads |",
        "|---|---|---|---|---|---|---|",
        *(_line(headline.label, comparison) for headline, comparison in found),
        "",
        f"Of all {len(everything)} comparisons on this device the alternative has the better median in {len(lost)}, "
        f"clearly in {clearly}.",
    ]
    return "\n".join(lines)


def _line(label: str, c: Comparison) -> str:
    figures = [
        label,
        f"`{c.other['case']}`",
        f"{significant(c.ours['median'])} {c.ours['unit']}",
        f"{significant(c.other['median'])} {c.other['unit']}, {provider_words(c.other)}",
        quotient_text(c),
        str(c.ours["runs"]),
        versions_of(c.ours).get("threads", ""),
    ]
    return f"| {' | '.join(figures)} |"
