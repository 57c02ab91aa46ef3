"""Read the keys of configuration classes: fields, types, bounds and units, for help texts and documentation."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any

# The configuration class of each section of a recipe file, in the order of a recipe. `register` adds each class.
SECTIONS: dict[str, type[Any]] = {}
_ORDER = ("sft", "sample", "reward", "value", "ppo", "generate", "export", "study")
SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def register(section: str, cls: type[Any]) -> None:
    """Add the configuration class of a section."""
    SECTIONS[section] = cls
    for name in _ORDER:
        if name in SECTIONS:
            SECTIONS[name] = SECTIONS.pop(name)


def fields_of(cls: type[Any]) -> dict[str, Any]:
    """Return the keys of a configuration class; their annotations are resolved types."""
    return cls.__pydantic_fields__


def bounds_of(field: Any) -> list[tuple[str, float]]:
    """Return the bounds of a key as pairs such as ("ge", 0)."""
    return [(s, getattr(m, s)) for m in field.metadata for s in SIGNS if getattr(m, s, None) is not None]


def unit_of(field: Any) -> str:
    """Return the unit of a key, or an empty text."""
    return (field.json_schema_extra or {}).get("unit", "")


def is_section(kind: Any) -> bool:
    """Return whether a type is a configuration class, whose key has keys of its own."""
    return dataclasses.is_dataclass(kind)


@dataclasses.dataclass(frozen=True)
class ConfigKey:
    """One key, as texts for help and documentation."""

    name: str
    type: str
    default: str
    unit: str
    bounds: str
    help: str


def type_text(kind: Any, long: bool = False) -> str:
    """Return a type in words: short for tables, long for sentences."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        words = [str(arg).lower() if isinstance(arg, bool) else arg for arg in args]
        return f"one of {', '.join(words)}" if long else " | ".join(words)
    if origin is list:
        plurals = {str: "text", float: "numbers", int: "whole numbers"}
        item = "{" + ", ".join(fields_of(args[0])) + "}" if is_section(args[0]) else plurals[args[0]]
        return f"a list of {item}" if long else f"list of {item}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if k is type(None) else type_text(k, long) for k in args)
    short = {str: "text", bool: "bool", int: "int", float: "float"}
    sentence = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
    return (sentence if long else short)[kind]


def value_text(value: Any) -> str:
    """Return a key's value as the tables show it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return '""' if value == "" else str(value)


def config_keys(cls: type[Any], base: Any = None, prefix: str = "") -> list[ConfigKey]:
    """Return every key of `cls`, nested ones with dotted names, with the defaults of its section."""
    return list(_iterate_keys(cls, cls() if base is None else base, prefix or cls.section))


def _iterate_keys(cls: type[Any], base: Any, prefix: str) -> Iterator[ConfigKey]:
    for key, field in fields_of(cls).items():
        kind, name, default = field.annotation, f"{prefix}.{key}", getattr(base, key)
        if is_section(kind):
            yield from _iterate_keys(kind, default, name)
            continue
        bounds = ", ".join(f"{SIGNS[sign]} {bound:g}" for sign, bound in bounds_of(field))
        yield ConfigKey(name, type_text(kind), value_text(default), unit_of(field), bounds, field.description or "")
        item = typing.get_args(kind)[0] if typing.get_origin(kind) is list else None
        if item and is_section(item):
            yield from _iterate_keys(item, item(), f"{name}[]")
