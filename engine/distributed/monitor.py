"""Name the rank that hangs, and what the other ranks wait for.

A thread of every rank watches the rank's main thread. When its position has not changed for a while, the thread posts
the position and the phase of the run to the rendezvous store. The lowest rank that waits then prints where all ranks
are. A hanging rank stands elsewhere than the others.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

from icegrt.utils.text import duration

if TYPE_CHECKING:
    from icegrt.distributed.control import Control

POLL_S, NOTICE_S = 10.0, 120.0
# Functions of these modules wait for other ranks.
_WAITS = ("torch.distributed.distributed_c10d", "icegrt.distributed.control", "icegrt.distributed.cluster")


class Position(NamedTuple):
    """Where a rank is.

    Attributes:
        phase: of the run, for example "rollout".
        place: innermost function of icegrt on the stack, with file and line.
        operation: the collective or wait that the rank is in; empty if it computes.
        seconds: how long it has been there.
    """

    phase: str
    place: str
    operation: str
    seconds: float


class HangMonitor:
    """Watch the thread that constructs it until `stop()`; all ranks have one.

    Args:
        control: messages between ranks; this object uses a connection of its own.
        report: prints a notice.
        poll_s: seconds between two looks at the thread.
        notice_s: seconds without movement before the first notice; the next ones come after twice the time each.
    """

    def __init__(
        self,
        control: Control,
        report: Callable[[str], None],
        poll_s: float = POLL_S,
        notice_s: float = NOTICE_S,
    ) -> None:
        self.phase = ""
        self._control, self._report = control, report
        self._poll_s, self._notice_s = poll_s, notice_s
        self._watched_thread = threading.get_ident()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="icegrt-hang-monitor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join(2 * self._poll_s)

    def describe(self) -> str:
        """Return where all ranks are, those in the rarest position first."""
        positions = {rank: _parse(post) for rank, post in enumerate(self._control.posts())}
        return describe_positions(positions)

    def _run(self) -> None:
        last_stack: tuple[tuple[str, int], ...] = ()
        moved_at, next_notice = time.monotonic(), self._notice_s
        while not self._stopped.wait(self._poll_s):
            frame = sys._current_frames().get(self._watched_thread)
            if frame is None:
                return
            # 1. Has the thread moved since the last look?
            stack = tuple((f.f_code.co_filename, f.f_lineno) for f in _frames(frame))
            now = time.monotonic()
            if stack != last_stack:
                last_stack, moved_at, next_notice = stack, now, self._notice_s
            position = Position(self.phase, *_place_and_operation(frame), now - moved_at)
            del frame
            # 2. Publish, and print if this rank is the lowest that stands still.
            try:
                self._control.post(json.dumps(position))
                if now - moved_at >= next_notice and self._is_lowest_standing():
                    self._report(f"no rank has gone on for {duration(now - moved_at)}; {self.describe()}")
                    next_notice *= 2
            except RuntimeError:  # the store is gone, and with it rank 0
                return

    def _is_lowest_standing(self) -> bool:
        positions = [_parse(post) for post in self._control.posts()]
        standing = [rank for rank, p in enumerate(positions) if p is not None and p.seconds >= self._notice_s / 2]
        return bool(standing) and min(standing) == self._control.rank


def describe_positions(positions: dict[int, Position | None]) -> str:
    """Return the ranks by position, those in the rarest position first.

    Args:
        positions: of every rank; None if the rank has not posted one.
    """
    ranks_at: dict[tuple[str, str, str] | None, list[int]] = {}
    for rank, position in positions.items():
        ranks_at.setdefault(None if position is None else position[:3], []).append(rank)
    texts = []
    # A rank that computes is the one that the waiting ranks need.
    for key, ranks in sorted(ranks_at.items(), key=lambda item: (bool(item[0] and item[0][2]), len(item[1]))):
        names = f"rank{'s' * (len(ranks) > 1)} {rank_ranges(ranks)}"
        if key is None:
            texts.append(f"{names}: no sign since the start")
            continue
        phase, place, operation = key
        where = f" in the phase {phase}" if phase else ""
        texts.append(
            f"{names}: {f'waiting in {operation}' if operation else 'running'}, {place or 'outside icegrt'}{where}"
        )
    return "; ".join(texts)


def rank_ranges(ranks: Iterable[int]) -> str:
    """Return sorted ranks as text: "0-3, 7"."""
    starts_and_ends: list[list[int]] = []
    for rank in ranks:
        if starts_and_ends and rank == starts_and_ends[-1][1] + 1:
            starts_and_ends[-1][1] = rank
        else:
            starts_and_ends.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in starts_and_ends)


def _parse(post: str) -> Position | None:
    return Position(*json.loads(post)) if post else None


def _frames(frame: FrameType | None) -> Iterable[FrameType]:
    """Iterate over a stack from its innermost frame."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _place_and_operation(frame: FrameType) -> tuple[str, str]:
    """Return the innermost position in icegrt, and the collective or wait that it is in."""
    operation = ""
    for outer in _frames(frame):
        module = outer.f_globals.get("__name__", "")
        if module.startswith(_WAITS):
            operation = outer.f_code.co_name.strip("_")
        elif module.startswith("icegrt."):
            return f"{module}.{outer.f_code.co_name} (line {outer.f_lineno})", operation
    return "", operation
