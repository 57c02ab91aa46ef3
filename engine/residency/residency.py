"""Which parts of the roles are on the device.

A caller holds what it is about to use. Then everything else that may be offloaded leaves the device, and what is held
returns to it. Nothing moves when a hold ends, so consecutive uses of one role move it once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal, get_args

from icegrt.residency.part import Part

Kind = Literal["parameters", "gradients", "optimizer"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PARAMETERS, GRADIENTS, OPTIMIZER = KINDS


class Residency:
    """The parts of all roles that may be offloaded. What was never added is always on the device."""

    def __init__(self) -> None:
        self._parts: dict[tuple[str, Kind], Part] = {}
        self._held: list[frozenset[tuple[str, Kind]]] = []

    def add(self, role: str, kind: Kind, part: Part) -> None:
        """Add a part that is on the device."""
        self._parts[role, kind] = part

    @contextlib.contextmanager
    def hold(self, role: str, *kinds: Kind, trunk: str | None = None) -> Iterator[None]:
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
        held = frozenset().union(*self._held)
        for key, part in self._parts.items():
            if key not in held:
                part.release()
        for key, part in self._parts.items():
            if key in held:
                part.fill()

    def resident(self) -> set[tuple[str, Kind]]:
        """Return role and kind of the parts that are on the device and may be offloaded."""
        return {key for key, part in self._parts.items() if part.is_resident}


class Placement:
    """The parts of one role in a `Residency`; without one, the role is always on the device.

    Args:
        role: name of the role.

    Attributes:
        residency: of all roles.
        trunk: name of the role whose parameters this one reads beside its own; None: it has a whole model.
    """

    def __init__(self, role: str) -> None:
        self.role = role
        self.residency: Residency | None = None
        self.trunk: str | None = None

    def hold(self, *kinds: Kind) -> contextlib.AbstractContextManager[None]:
        """Keep `kinds` on the device within the context; see `Residency.hold`."""
        if self.residency is None:
            return contextlib.nullcontext()
        return self.residency.hold(self.role, *kinds, trunk=self.trunk)

    def require(self, *kinds: Kind) -> None:
        """Move `kinds` to the device. They stay there until something else is held."""
        with self.hold(*kinds):
            pass
