"""Read a trace of PyTorch's profiler: time by range and operator, idle gaps, and memory, as one page of text."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROFILE_FOLDER = "profile"
TOP_OPERATORS = 20
LONGEST_GAPS = 10

_RANGE, _OPERATOR, _MEMORY = "user_annotation", "cpu_op", "[memory]"
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Span:
    """An event of a trace: its name, the track it stands on, and its times in microseconds."""

    name: str
    track: tuple[Any, Any]
    start: float
    end: float

    @property
    def duration(self) -> float:
        """Return the microseconds between start and end."""
        return self.end - self.start


@dataclass(frozen=True)
class Total:
    """Calls and microseconds of all spans of a name."""

    name: str
    calls: int
    microseconds: float


@dataclass(frozen=True)
class Gap:
    """Idle time on one track, and the innermost range that it begins in."""

    start: float
    duration: float
    inside: str


@dataclass(frozen=True)
class RangeMemory:
    """Bytes allocated in a range, counted from the start of the trace: its first, highest and last value."""

    name: str
    first: int
    peak: int
    last: int


def profile_files(run_dir: Path) -> list[str]:
    """Return the files of a run's profiles, relative to its folder, in order."""
    return [f"{PROFILE_FOLDER}/{path.name}" for path in sorted((run_dir / PROFILE_FOLDER).glob("[!.]*"))]


def spans(trace: Mapping[str, Any], *categories: str) -> list[Span]:
    """Return the complete events of some categories, in the order of their start."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and e.get("cat") in categories]
    found = [Span(e["name"], (e["pid"], e["tid"]), e["ts"], e["ts"] + e.get("dur", 0)) for e in events]
    return sorted(found, key=lambda span: (span.start, -span.end))


def totals(found: Iterable[Span]) -> list[Total]:
    """Return calls and durations by name, in the order of first appearance."""
    durations: dict[str, list[float]] = defaultdict(list)
    for span in found:
        durations[span.name].append(span.duration)
    return [Total(name, len(items), sum(items)) for name, items in durations.items()]


def self_totals(found: Iterable[Span]) -> list[Total]:
    """Return calls and self time by name, longest first: durations without those of spans inside, on each track."""
    by_track: dict[tuple[Any, Any], list[Span]] = defaultdict(list)
    for span in found:
        by_track[span.track].append(span)
    calls: dict[str, int] = defaultdict(int)
    times: dict[str, float] = defaultdict(float)
    for track in by_track.values():
        open_spans: list[Span] = []
        for span in track:
            while open_spans and open_spans[-1].end <= span.start:
                open_spans.pop()
            if open_spans:
                times[open_spans[-1].name] -= span.duration
            calls[span.name] += 1
            times[span.name] += span.duration
            open_spans.append(span)
    rows = [Total(name, calls[name], times[name]) for name in calls]
    return sorted(rows, key=lambda row: -row.microseconds)


def busy_intervals(found: Iterable[Span]) -> list[tuple[float, float]]:
    """Return the union of spans, in the order of their start, as intervals that do not touch."""
    union: list[tuple[float, float]] = []
    for span in found:
        if union and span.start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], span.end))
        else:
            union.append((span.start, span.end))
    return union


def idle_gaps(found: Iterable[Span], ranges: Sequence[Span], start: float, end: float) -> list[Gap]:
    """Return the times between `start` and `end` that no span covers, in their order.

    Args:
        found: spans in the order of their start; spans of several tracks count as one.
        ranges: the ranges of the main thread, in the order of their start.
        start, end: in microseconds.
    """
    gaps, position = [], start
    for first, last in [*busy_intervals(found), (end, end)]:
        first = min(first, end)
        if first > position:
            gaps.append(Gap(position, first - position, _innermost(ranges, position)))
        position = max(position, last)
    return gaps


def memory_by_range(trace: Mapping[str, Any], ranges: Sequence[Span]) -> list[RangeMemory]:
    """Return the allocated bytes in each range, in order; ranges of one name are one row with their highest peak.

    The device is the GPU if the trace has allocations of one, else the CPU.
    """
    events = [e for e in trace["traceEvents"] if e.get("name") == _MEMORY and "Total Allocated" in e.get("args", {})]
    devices = {e["args"]["Device Type"] for e in events}
    events = [e for e in events if e["args"]["Device Type"] == max(devices)]  # 0: CPU, 1: CUDA
    events.sort(key=lambda e: e["ts"])
    times, sizes = [e["ts"] for e in events], [int(e["args"]["Total Allocated"]) for e in events]
    rows: dict[str, RangeMemory] = {}
    for span in ranges:
        first, last = bisect.bisect_left(times, span.start), bisect.bisect_right(times, span.end)
        inside = sizes[first:last]
        if not inside:
            continue
        row = rows.get(span.name, RangeMemory(span.name, sizes[max(first - 1, 0)], inside[0], inside[-1]))
        rows[span.name] = RangeMemory(span.name, row.first, max(row.peak, *inside), inside[-1])
    return list(rows.values())


def summary_text(trace: Mapping[str, Any]) -> str:
    """Return the summary of a trace: ranges, operators, idle time and memory.

    On a GPU the operators are its kernels and copies, and idle is the time in which none of them runs. On a CPU they
    are PyTorch's operators by self time, and idle is the time of the main thread outside of them.
    """
    ranges = spans(trace, _RANGE)
    if not ranges:
        return "The trace has no range.\n"
    main, start, end = ranges[0].track, ranges[0].start, max(span.end for span in ranges)
    ranges = [span for span in ranges if span.track == main]
    operators, work = spans(trace, _OPERATOR), spans(trace, *_DEVICE_WORK)
    wall = end - start
    lines = [f"Profiled: {_milliseconds(wall)} ms of the main thread", "", "Ranges", ""]
    lines += _table(("range", "calls", "ms", "share"), [_row(total, wall) for total in totals(ranges)])
    if work:
        top, busy, where = self_totals(work), work, "no kernel or copy on the device"
        lines += ["", "Kernels and copies of the device", ""]
    else:
        top, where = self_totals(operators), "the main thread outside of operators"
        busy = [span for span in operators if span.track == main]
        lines += ["", "Operators, by the time in themselves", ""]
    shown = [_row(total, wall) for total in top[:TOP_OPERATORS]]
    lines += _table(("operator", "calls", "ms", "share"), shown)
    gaps = idle_gaps(busy, ranges, start, end)
    idle = sum(gap.duration for gap in gaps)
    lines += ["", f"Idle: {_milliseconds(idle)} ms, {idle / wall:.1%} ({where})", ""]
    by_range: dict[str, list[float]] = defaultdict(list)
    for gap in gaps:
        by_range[gap.inside].append(gap.duration)
    rows = [Total(name, len(times), sum(times)) for name, times in by_range.items()]
    rows.sort(key=lambda total: -total.microseconds)
    lines += _table(("in range", "gaps", "ms", "share"), [_row(total, wall) for total in rows])
    longest = sorted(gaps, key=lambda gap: -gap.duration)[:LONGEST_GAPS]
    lines += ["", "Longest gaps", ""]
    cells = [(gap.inside, _milliseconds(gap.start - start), _milliseconds(gap.duration)) for gap in longest]
    lines += _table(("in range", "starts at ms", "ms"), cells)
    memory = memory_by_range(trace, ranges)
    if memory:
        lines += ["", "Memory allocated since the profile began, MiB", ""]
        sizes = [(row.name, *(f"{size / 2**20:.1f}" for size in (row.first, row.peak, row.last))) for row in memory]
        lines += _table(("range", "before", "peak", "after"), sizes)
    return "\n".join(lines) + "\n"


def _innermost(ranges: Sequence[Span], time: float) -> str:
    inside = [span for span in ranges if span.start <= time < span.end]
    return inside[-1].name if inside else "(no range)"


def _row(total: Total, wall: float) -> tuple[str, ...]:
    return total.name, str(total.calls), _milliseconds(total.microseconds), f"{total.microseconds / wall:.1%}"


def _milliseconds(microseconds: float) -> str:
    return f"{microseconds / 1000:.1f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [list(head), *([_short(row[0]), *row[1:]] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in cells
    ]


def _short(name: str) -> str:
    return name if len(name) <= 60 else name[:57] + "..."
