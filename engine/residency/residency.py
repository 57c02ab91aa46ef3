"""Which parts of the roles are on the device.

A caller holds what it is about to use. Then everything else that may be offloaded leaves the device, and what is held
returns to it. Nothing moves when a hold ends, so consecutive uses of one role move it once. With prefetching, what the
next hold is expected to need stays, or begins to return, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal, get_args

from icegrt.errors import RunError
from icegrt.residency.layers import LayerParts
from icegrt.residency.order import RecurringOrder
from icegrt.residency.part import Part

Kind = Literal["parameters", "gradients", "optimizer"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PARAMETERS, GRADIENTS, OPTIMIZER = KINDS
# What the layers of a model leave over, where these visit the device one after another; a part of its parameters.
ENDS = "embedding and head"
Key = tuple[str, str]


class Residency:
    """The parts of all roles that may be offloaded. What was never added is always on the device.

    Args:
        prefetch: bring back what the next hold needs while the present one computes, if the device has the memory for
            both. The next hold is the one that followed in earlier iterations.
    """

    def __init__(self, *, prefetch: bool = False) -> None:
        self._parts: dict[Key, Part | LayerParts] = {}
        self._held: list[frozenset[Key]] = []
        self._order: RecurringOrder[frozenset[Key]] | None = RecurringOrder() if prefetch else None

    def add(self, role: str, kind: str, part: Part | LayerParts) -> None:
        """Add a part that is on the device."""
        self._parts[role, kind] = part

    @contextlib.contextmanager
    def hold(self, role: str, *kinds: str, trunk: str | None = None) -> Iterator[None]:
        """Keep `kinds` of a role on the device within the context, beside what outer contexts hold.

        Args:
            role: name of the role.
            kinds: of its state.
            trunk: name of the role whose parameters it reads too; they are held with its own.

        Raises:
            RunError: they do not fit on the device, or what must leave it does not fit on the host. Nothing is lost.
        """
        held = {(role, kind) for kind in kinds}
        if trunk is not None and PARAMETERS in kinds:
            held.add((trunk, PARAMETERS))
        self._held.append(frozenset(held))
        try:
            self.move()
            yield
        finally:
            self._held.pop()

    def move(self) -> None:
        """Move to the host what no context holds, then to the device what one holds.

        Raises:
            RunError: as `hold`.
        """
        held: frozenset[Key] = frozenset().union(*self._held)
        expected = self._expected_after(held)
        for key, part in self._parts.items():
            if key not in held | expected:
                part.release()
        self._fill(held, expected)
        for key, part in self._parts.items():
            if key in expected - held and part.is_kept and not part.prefetch():
                break

    def _expected_after(self, held: frozenset[Key]) -> frozenset[Key]:
        """Return what the next hold is expected to need; nothing without prefetching, or if nothing is held."""
        if self._order is None or not held:
            return frozenset()
        return self._order.after(held) or frozenset()

    def _fill(self, held: frozenset[Key], expected: frozenset[Key]) -> None:
        """Bring what is held to the device; what is expected leaves if there is too little memory for both."""
        try:
            for key, part in self._parts.items():
                if key in held:
                    part.fill()
        except RunError:
            if not expected - held:
                raise
            for key, part in self._parts.items():
                if key in expected - held:
                    part.release()
            self._fill(held, frozenset())

    def resident(self) -> set[Key]:
        """Return role and kind of the parts that are on the device and may be offloaded."""
        return {key for key, part in self._parts.items() if part.is_resident}


class Placement:
    """The parts of one role in a `Residency`; without one, the role is always on the device.

    Args:
        role: name of the role.

    Attributes:
        residency: of all roles; None: the role is always on the device.
        trunk: name of the role whose parameters this one reads beside its own; None: it has a whole model.
        is_streamed: forward passes bring the layers to the device, one after another.
    """

    def __init__(self, role: str) -> None:
        self.role = role
        self.residency: Residency | None = None
        self.trunk: str | None = None
        self.is_streamed = False

    def hold(self, *kinds: Kind) -> contextlib.AbstractContextManager[None]:
        """Keep `kinds` on the device within the context; see `Residency.hold`."""
        if self.residency is None:
            return contextlib.nullcontext()
        ends = (ENDS,) if self.is_streamed and PARAMETERS in kinds else ()
        return self.residency.hold(self.role, *kinds, *ends, trunk=self.trunk)

    def hold_for_pass(self) -> contextlib.AbstractContextManager[None]:
        """Keep on the device what a forward pass needs beside the layers that it brings there by itself."""
        if self.residency is None or not self.is_streamed:
            return self.hold(PARAMETERS)
        return self.residency.hold(self.role, ENDS)

    def require(self, *kinds: Kind) -> None:
        """Move `kinds` to the device. They stay there until something else is held."""
        with self.hold(*kinds):
            pass
