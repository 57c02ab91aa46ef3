"""Search for the changes that make a run fit. Every candidate is rehearsed; nothing is estimated.

An axis is tried at its strongest level first: if that does not suffice, its milder levels do not either. If no axis
suffices alone, the one with the smallest peak is taken and the others are tried beside it. What is found is then made
milder, one axis after another, as long as it fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from icegrt.config import PPOConfig
from icegrt.errors import UserError
from icegrt.planning.changes import Change, Cluster, apply, changes_of
from icegrt.planning.footprint import RankMemory, device_bytes

Rehearse = Callable[[PPOConfig], Sequence[RankMemory]]


@dataclass(frozen=True)
class Candidate:
    """A rehearsed set of changes.

    Attributes:
        changes: one per axis.
        config: with the changes.
        ranks: the memory of each kind of rank.
    """

    changes: tuple[Change, ...]
    config: PPOConfig
    ranks: Sequence[RankMemory]

    @property
    def device_bytes(self) -> int:
        """The largest peak of device memory."""
        return device_bytes(self.ranks)


class Search:
    """The candidates of one configuration, each rehearsed once.

    Args:
        config: that is to fit.
        cluster: what it runs on.
        rehearse: returns the memory of a configuration.
        usable_bytes: device memory that a run may take.
        axes: what may change.
        report: called with a line for each rehearsed candidate.
    """

    def __init__(
        self,
        config: PPOConfig,
        cluster: Cluster,
        rehearse: Rehearse,
        usable_bytes: int,
        axes: Iterable[str],
        report: Callable[[str], None],
    ) -> None:
        self._config, self._rehearse, self._usable = config, rehearse, usable_bytes
        self._report = report
        self._levels = {axis: levels for axis, levels in changes_of(config, cluster).items() if axis in set(axes)}
        self._candidates: dict[tuple[Change, ...], Candidate | None] = {}
        self.base = self._rehearsed(())

    def fits(self, candidate: Candidate) -> bool:
        """Return whether the largest peak of a candidate is within the usable memory."""
        return candidate.device_bytes <= self._usable

    @property
    def rehearsed(self) -> int:
        """Number of rehearsed configurations."""
        return len(self._candidates)

    def run(self) -> list[Candidate]:
        """Return candidates that fit; none, if the changes do not suffice. The base is one of them if it fits."""
        if self.fits(self.base):
            return [self.base]
        state, axes = self.base, list(self._levels)
        while axes:
            options = ((axis, self._try((*state.changes, self._levels[axis][-1]))) for axis in axes)
            tried = {axis: candidate for axis, candidate in options if candidate is not None}
            fitting = [self._milder(candidate) for candidate in tried.values() if self.fits(candidate)]
            if fitting:
                return list({candidate.changes: candidate for candidate in fitting}.values())
            best = min(tried, key=lambda axis: tried[axis].device_bytes, default=None)
            if best is None or tried[best].device_bytes >= state.device_bytes:
                return []
            state = tried[best]
            axes.remove(best)
        return []

    def _milder(self, candidate: Candidate) -> Candidate:
        """Return a fitting candidate with the mildest level of each axis, the last axis first."""
        for axis in [change.axis for change in reversed(candidate.changes)]:
            others = tuple(change for change in candidate.changes if change.axis != axis)
            current = next(change for change in candidate.changes if change.axis == axis)
            levels = self._levels[axis]
            options = [others, *((*others, level) for level in levels[: levels.index(current)])]
            candidate = next((c for o in options if (c := self._try(o)) is not None and self.fits(c)), candidate)
        return candidate

    def _try(self, changes: tuple[Change, ...]) -> Candidate | None:
        """Return a rehearsed candidate; None if the engine refuses the configuration."""
        changes = tuple(sorted(changes, key=lambda change: list(self._levels).index(change.axis)))
        if changes not in self._candidates:
            try:
                self._candidates[changes] = self._rehearsed(changes)
            except UserError:
                self._candidates[changes] = None
        return self._candidates[changes]

    def _rehearsed(self, changes: tuple[Change, ...]) -> Candidate:
        config = apply(self._config, changes)
        candidate = Candidate(changes, config, self._rehearse(config))
        self._candidates[changes] = candidate
        verdict = "fits" if self.fits(candidate) else "does not fit"
        name = " ".join(map(str, changes)) or "the configuration"
        self._report(f"{name}: {candidate.device_bytes / 1e9:.2f} GB, {verdict}")
        return candidate
