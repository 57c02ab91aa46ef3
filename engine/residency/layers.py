"""The layers of a frozen model, which visit the device one after another in a forward pass."""

from __future__ import annotations

from collections.abc import Sequence

from icegrt.residency.part import Part


class LayerParts:
    """The parameters of a model's layers as one part that a forward pass brings to the device piece by piece.

    Call `enter` before each layer. Layers may come in any order; in ascending order, which then repeats, each is on its
    way while the one before it computes. At most two are on the device, unless `fill` has brought all of them.

    Args:
        parts: one per layer, on the device.
    """

    is_kept = True

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = list(parts)
        self._is_whole = True
        self._visiting: set[int] = set()

    @property
    def is_resident(self) -> bool:
        """Whether all layers are on the device."""
        return self._is_whole

    def release(self) -> None:
        """Free the device memory of all layers; see `Part.release`."""
        self._is_whole = False
        for part in self._parts:
            part.release()
        self._visiting.clear()

    def fill(self) -> None:
        """Bring all layers to the device; see `Part.fill`."""
        for part in self._parts:
            part.fill()
        self._is_whole = True

    def prefetch(self) -> bool:
        """Begin to bring the first layer to the device; see `Part.prefetch`."""
        self._visiting.add(0)
        return self._parts[0].prefetch()

    def enter(self, layer: int) -> None:
        """Bring a layer to the device and begin to bring the next; others leave. Nothing moves if all are there.

        Raises:
            RunError: the layer does not fit.
        """
        if self._is_whole:
            return
        following = (layer + 1) % len(self._parts)
        for other in self._visiting - {layer, following}:
            self._parts[other].release()
        self._visiting = {layer, following}
        self._parts[layer].fill()
        self._parts[following].prefetch()
