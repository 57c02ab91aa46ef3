"""Plain values, as JSON and YAML have them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

FLOAT32_MAX = 3.4028234663852886e38


def is_number(value: Any) -> bool:
    """Return whether `value` is an int or a float; a bool is neither here."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_float32_number(value: Any) -> bool:
    """Return whether `value` is a number that float32 holds: neither NaN, nor infinite, nor larger."""
    return is_number(value) and -FLOAT32_MAX <= value <= FLOAT32_MAX  # an int of any size can be compared


def flatten(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every leaf of nested mappings; an empty mapping under a name is a leaf."""
    if not isinstance(values, Mapping) or (not values and name):
        yield name, values
        return
    for key, value in values.items():
        yield from flatten(value, f"{name}.{key}" if name else str(key))
