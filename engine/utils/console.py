"""Console output of a stage: lines, warnings, progress and tables, on a terminal, in a log or in a notebook.

Only rank 0 prints. rich's markup is off, so brackets in a model's text appear unchanged; `plain` removes escape
sequences. `print_info` and `table` write to stdout, warnings and progress to stderr. rich is imported on first use on a
terminal.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TextIO

from icegrt.utils.text import duration

FIRST_LINE_S, NEXT_LINE_S, REDRAW_S = 2.0, 10.0, 0.1
# 1. escape sequences (CSI, OSC and two-byte ones); 2. control characters except tab and newline, and the marks that
# reverse the direction of the text after them, which can make a line read as another.
_ESCAPES = re.compile(r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|[\x1b\x9b]\[?[0-?]*[ -/]*[@-~]?")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

_quiet: ContextVar[bool] = ContextVar("icegrt_quiet", default=False)
_open_display: ContextVar[Any] = ContextVar("icegrt_progress", default=None)
_stopping = False  # a stop signal has been announced: bars are not drawn any more


def plain(text: Any) -> str:
    """Return text without escape sequences and control characters, except tab and newline."""
    return _CONTROLS.sub("", _ESCAPES.sub("", str(text).replace("\r\n", "\n")))


def is_main() -> bool:
    """Return whether this process prints: it is rank 0 or the only one."""
    return os.environ.get("RANK", "0") == "0"


def is_quiet() -> bool:
    """Return whether `print_info` and `progress` are silent: inside `quiet()`, or ICEGRT_QUIET is set and not 0."""
    return _quiet.get() or os.environ.get("ICEGRT_QUIET", "0") not in ("", "0")


@contextlib.contextmanager
def quiet(on: bool = True) -> Iterator[None]:
    """Silence `print_info` and `progress` inside the `with`. Warnings are still printed."""
    token = _quiet.set(on)
    try:
        yield
    finally:
        _quiet.reset(token)


def is_terminal(stream: TextIO) -> bool:
    """Return whether `stream` can redraw a line. Notebooks and log files cannot."""
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):  # a replacement without isatty, or a closed stream
        return False


def announce_stop(text: str) -> None:
    """Print a line in a signal handler on rank 0, in place of the progress bars, which are not drawn again."""
    global _stopping
    if not is_main():
        return
    display = _open_display.get()
    _stopping = True
    # The cursor is in the last line of the bars; rich moves it up by one less than their number, and erases, later.
    start, end = ("\r\x1b[2K", "\n" * len(display.tasks)) if display is not None else ("\n", "\n")
    with contextlib.suppress(OSError):  # `print` is not reentrant, and the signal may arrive inside of one
        os.write(2, f"{start}{text}{end}".encode())


@contextlib.contextmanager
def bars_after_stop() -> Iterator[None]:
    """Let bars be drawn again when the block, which received stop signals, has ended."""
    global _stopping
    try:
        yield
    finally:
        _stopping = False


def print_info(text: Any = "") -> None:
    """Print a line on rank 0, unless quiet."""
    if is_main() and not is_quiet():
        _print(plain(text), sys.stdout)


def warn(text: Any) -> None:
    """Print a warning to stderr on rank 0, quiet or not."""
    if is_main():
        _print(f"warning: {plain(text)}", sys.stderr)


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]], *, file: TextIO | None = None) -> None:
    """Print rows under headers on rank 0: by rich on a terminal, aligned with spaces elsewhere."""
    file = file or sys.stdout
    cells = [[plain(cell) for cell in row] for row in rows]
    if not is_main():
        return
    if not is_terminal(file):
        lines = [list(headers), *cells]
        widths = [min(max(len(line[i]) for line in lines), 48) for i in range(len(headers))]
        for line in lines:
            padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            _print("  ".join(padded).rstrip(), file)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rich_table = Table(*headers, box=box.SIMPLE_HEAD, pad_edge=False)
    rich_table.columns[0].no_wrap = True  # people search for names and copy them
    for row in cells:
        rich_table.add_row(*(Text(cell) for cell in row))
    Console(file=file).print(rich_table)


def styled(pieces: Sequence[tuple[str, str]]) -> None:
    """Print one paragraph of (text, rich style) pieces on rank 0, unless quiet; markup in a text is not applied."""
    if not is_main() or is_quiet():
        return
    from rich.console import Console
    from rich.text import Text

    Console(file=sys.stdout).print(Text.assemble(*((plain(text), style) for text, style in pieces)), soft_wrap=True)


class Progress:
    """A counter of finished units. `advance` counts; its fields (a loss, a score) appear beside the count.

    This class prints nothing: it serves quiet mode and ranks other than 0.
    """

    def __init__(self, total: float | None, label: str, unit: str, clock: Callable[[], float] = time.monotonic):
        self.total, self.label, self.unit = total, plain(label), plain(unit)
        self.done: float = 0
        self._clock, self._fields = clock, ""
        self._start = clock()
        self._next = self._start + FIRST_LINE_S

    def advance(self, n: float = 1, **fields: Any) -> None:
        """Add `n` finished units. `fields` replace the fields of earlier calls."""
        self.done += n
        if fields:
            self._fields = "  ".join(f"{name} {_field(value)}" for name, value in fields.items())
        self._show()

    def rate(self) -> str:
        """Return the units per second so far, as text."""
        elapsed = self._clock() - self._start
        return f"{_number(self.done / elapsed)} {self.unit}/s".replace(" /s", "/s") if elapsed > 0 and self.done else ""

    def time_left(self) -> str:
        """Return the time left at the rate so far; empty if the total is unknown."""
        if not self.total or not self.done:
            return ""
        return f"{duration((self._clock() - self._start) * max(self.total - self.done, 0) / self.done)} left"

    def count(self) -> str:
        """Return `128/512 responses (25%)`, or `128 responses` if the total is unknown."""
        total = f"/{_number(self.total)}" if self.total else ""
        percent = f" ({100 * self.done / self.total:.0f}%)" if self.total else ""
        return f"{_number(self.done)}{total} {self.unit}".rstrip() + percent

    def final_line(self, failed: bool) -> str:
        """Return the line to print at the end; empty for work of at most 2 s."""
        elapsed = self._clock() - self._start
        if elapsed <= FIRST_LINE_S:
            return ""
        partial = failed or (self.total is not None and self.done < self.total)
        result = f"stopped at {self.count()} after" if partial else f"{_number(self.done)} {self.unit}".rstrip() + " in"
        return "  ".join(filter(None, (f"{self.label}: {result} {duration(elapsed)}", self.rate(), self._fields)))

    def _show(self) -> None:
        pass


class _Lines(Progress):
    """Progress on a stream that cannot redraw: a line after 2 s, then one every 10 s."""

    def _show(self) -> None:
        # The final line replaces the one at 100%.
        if self._clock() < self._next or (self.total and self.done >= self.total):
            return
        self._next = self._clock() + NEXT_LINE_S
        parts = (f"{self.label}: {self.count()}", self.rate(), self.time_left(), self._fields)
        _print("  ".join(filter(None, parts)), sys.stderr)


class _Bar(Progress):
    """Progress as one line of rich's live display, which nested bars share."""

    def __init__(self, display: Any, *args: Any):
        super().__init__(*args)
        self._display, self._next_draw = display, 0.0
        self._task = display.add_task(self.label, total=self.total, note="")

    def _show(self) -> None:
        if _stopping:
            return
        note = "  ".join(filter(None, (self.count(), self.rate(), self.time_left(), self._fields)))
        self._display.update(self._task, completed=self.done, note=note)
        # The display has no thread of its own: one would draw the bar below the message of a stop signal.
        if self._clock() >= self._next_draw:
            self._next_draw = self._clock() + REDRAW_S
            self._display.refresh()

    def close(self) -> None:
        self._display.remove_task(self._task)


@contextlib.contextmanager
def progress(
    total: float | None, label: str, unit: str = "", *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Progress]:
    """Report work of `total` units (None: unknown) done inside the `with`; yield the object to `advance`.

    A terminal shows a bar with rate and time left, other streams show lines. Work of over 2 s leaves a final line.
    Calls may be nested.
    """
    if not is_main() or is_quiet():
        yield Progress(total, label, unit, clock)
        return
    with contextlib.ExitStack() as stack:
        if is_terminal(sys.stderr):
            reporter: Progress = _Bar(stack.enter_context(_display()), total, label, unit, clock)
            stack.callback(reporter.close)
        else:
            reporter = _Lines(total, label, unit, clock)
        failed = True
        try:
            yield reporter
            failed = False
        finally:
            line = reporter.final_line(failed)
            if line:
                _print(line, sys.stderr)


@contextlib.contextmanager
def _display() -> Iterator[Any]:
    """Yield rich's live display: the open one, or a new one."""
    if _open_display.get() is not None:
        yield _open_display.get()
        return
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(bar_width=24),
        rich_progress.TextColumn("{task.fields[note]}", markup=False),
    )

    class Bars:
        def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
            if not _stopping:
                yield from display.get_renderables()

    class Display(rich_progress.Progress):
        def get_renderable(self) -> Any:
            return Bars()  # evaluated at every print, also at those between two calls of `refresh`

    # The display prints other lines above the bars, unless stdout is redirected.
    display = Display(
        *columns,
        console=Console(file=sys.stderr),
        transient=True,
        auto_refresh=False,
        redirect_stdout=is_terminal(sys.stdout),
    )
    token = _open_display.set(display)
    try:
        with display:
            yield display
    finally:
        _open_display.reset(token)


def _print(text: str, stream: TextIO) -> None:
    encoding = getattr(stream, "encoding", None) or "utf-8"  # replace a letter that the log's encoding lacks
    print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"


def _field(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else " ".join(plain(value).split())
