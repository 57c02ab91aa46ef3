"""Load, check, print and save the configuration classes; every error is one `ConfigError`.

Values of a file, of an override and of a constructor in Python are checked alike.

This module checks values before pydantic does, for three reasons. pydantic's lax mode accepts `true` as a number and
"5" as 5. Its messages name neither the file's line nor the unit. It builds a nested section from the defaults of its
class, but a command has its own (`sft: {optimizer: {lr: 2e-5}}` must keep the weight decay of `sft`).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from icegrt.config.introspect import SECTIONS, SIGNS, bounds_of, config_keys, fields_of, is_section, type_text, unit_of
from icegrt.config.strict_yaml import dump, parse
from icegrt.errors import ConfigError
from icegrt.utils.files import write_text_atomic
from icegrt.utils.redaction import REDACTED, is_secret, redact, redact_text
from icegrt.utils.values import is_number

if TYPE_CHECKING:
    from icegrt.config.base import Loadable

_COMMAND_LINE = "command line"

ConfigT = TypeVar("ConfigT", bound="Loadable")
KeyPath = tuple[Any, ...]  # the keys from the section down, list positions included


def load(cls: type[ConfigT], path: str | Path | None = None, overrides: Sequence[str] = ()) -> ConfigT:
    """Return the configuration `cls` from its section of the YAML file `path`, with the dotted `overrides` applied.

    Raises:
        ConfigError: lists every problem with its file and line (or "command line") and its key.
    """
    data, where = ({}, {}) if path is None else _read_section(cls, Path(path))
    problems: list[str] = []
    for override in overrides:
        try:
            data = _apply(cls, data, where, override)
        except ConfigError as error:
            problems.append(f"{_COMMAND_LINE}: {str(error).removeprefix(_COMMAND_LINE + ': ')}")
    config: Any = None if problems else _build(cls, data, cls(), (cls.section,), where, problems)
    _raise(problems)
    return config


def checked_values(cls: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a configuration made in Python, in the types of their keys.

    A mapping for a nested section changes the defaults that the section has in `cls`.

    Raises:
        ConfigError: lists every key that is unknown, mistyped or out of bounds.
    """
    fields, path = fields_of(cls), (getattr(cls, "section", "") or cls.__name__,)
    problems: list[str] = []
    checked = {}
    for name, value in values.items():
        if name not in fields:
            problems.append(f"{_origin((), {})}: {_unknown((*path, name), cls, SECTIONS.get(path[0]))}")
            continue
        default = fields[name].get_default(call_default_factory=True)
        checked[name] = _value(fields[name], value, default, (*path, name), {}, problems)
    _raise(problems)
    return checked


def _raise(problems: list[str]) -> None:
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError(f"{len(problems)} problems in the configuration:\n  " + "\n  ".join(problems))


def _read_section(cls: type[Any], path: Path) -> tuple[dict, dict[KeyPath, str]]:
    """Return the section of `cls` as plain data, and the file and line of each of its keys."""
    lines: dict[KeyPath, int] = {}
    data = parse(_read_text(path), str(path), lines)
    where = {key: f"{path}:{line}" for key, line in lines.items()}
    if data is None:
        raise ConfigError(f"{path} is empty; put the keys of this command under `{cls.section}:`")
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: got a {_type_name(data)}, expected sections such as `{cls.section}:` with their keys"
        )
    for name in data:
        if name not in SECTIONS and name != cls.section:
            is_key = name in fields_of(cls)
            hint = f"put it under `{cls.section}:`" if is_key else _nearest(name, SECTIONS)
            hint = hint or f"the sections are {', '.join(SECTIONS)}"
            raise ConfigError(f"{where[(name,)]}: `{name}` is not a section; {hint}")
    if cls.section not in data:
        raise ConfigError(f"{path} has no section `{cls.section}:`; it has {', '.join(data) or 'none'}")
    section = data[cls.section]
    if section is not None and not isinstance(section, dict):
        line = where[(cls.section,)]
        raise ConfigError(f"{line}: {cls.section}: got a {_type_name(section)}, expected keys and values, one per line")
    return section or {}, where  # None: every key is commented out


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        nearest = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], 1)
        hint = (
            f"did you mean {path.parent / nearest[0]}?" if nearest else "relative paths start at the current directory"
        )
        raise ConfigError(f"no configuration file {path}; {hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def _apply(cls: type[Any], data: dict, where: dict[KeyPath, str], override: str) -> dict:
    """Return `data` with one override `section.key=value` applied; update `where`."""
    name, equals, text = override.partition("=")
    parts = tuple(name.strip().split("."))
    if not name.strip():
        raise ConfigError(f"`{override}` names no key; write {cls.section}.key=VALUE")
    kind = _type_of_key(cls, parts)
    if not equals:
        raise ConfigError(f"`{override}` has no value; write {_dotted(parts)}=VALUE")
    value = _override_value(kind, text.strip(), f"{_COMMAND_LINE}: {_dotted(parts)}")
    if not isinstance(value, dict):
        for overridden in [path for path in where if path[: len(parts)] == parts]:
            del where[overridden]
    where[parts] = _COMMAND_LINE
    for part in reversed(parts[1:]):
        value = {part: value}
    return _merge(data, value)


def _merge(old: Any, new: Any) -> Any:
    """Return `new` over `old`, mapping by mapping, in new mappings, as YAML aliases share theirs."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    return old | {name: _merge(old.get(name), value) for name, value in new.items()}


def _type_of_key(cls: type[Any], parts: KeyPath) -> Any:
    """Return the type of the key that an override names; raise `ConfigError` with the nearest full name."""
    if parts[0] != cls.section:
        has_other_section = parts[0] in SECTIONS and len(parts) > 1
        nearest = _full_names(parts[1:] if has_other_section else parts, cls)
        reason = "does not start with its section"
        if has_other_section:
            reason = f"is not for this command, which reads `{cls.section}`"
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"keys start with `{cls.section}.`"
        raise ConfigError(f"`{_dotted(parts)}` {reason}; {hint}")
    if len(parts) == 1:
        raise ConfigError(f"`{cls.section}` is a section; name a key, as in {config_keys(cls)[0].name}=VALUE")
    kind: Any = cls
    for depth, part in enumerate(parts[1:], start=1):
        if not is_section(kind):
            raise ConfigError(f"`{_dotted(parts)}`: {_dotted(parts[:depth])} has no keys of its own; set it as a whole")
        if part not in fields_of(kind):
            raise ConfigError(_unknown(parts[: depth + 1], kind, cls))
        kind = fields_of(kind)[part].annotation
    return kind


def _override_value(kind: Any, text: str, origin: str) -> Any:
    """Return the value of an override. Text needs no quotes, so that a file may be named 007; the rest is YAML."""
    is_quoted = text[:1] in ("'", '"')
    if kind is str and not is_quoted:
        return text
    if kind == list[str] and not is_quoted and text[:1] != "[":
        return [text] if text else []
    return parse(text, origin)


def _build(cls: type[Any], data: Any, base: Any, path: KeyPath, where: dict[KeyPath, str], problems: list[str]) -> Any:
    """Return an instance of `cls` with `data` over the values of `base`; `base` if it appends to `problems`."""
    if data is None:
        return base
    if not isinstance(data, dict):
        keys = ", ".join(fields_of(cls))
        problems.append(f"{_located(path, where)}: got {_shown(path, data)}, expected a mapping with the keys {keys}")
        return base
    fields, n_problems = fields_of(cls), len(problems)
    values = {name: getattr(base, name) for name in fields}
    for name, value in data.items():
        key_path = (*path, name)
        if name not in fields:
            problems.append(f"{_origin(key_path, where)}: {_unknown(key_path, cls, SECTIONS.get(path[0]))}")
        else:
            values[name] = _value(fields[name], value, values[name], key_path, where, problems)
    if len(problems) > n_problems:
        return base
    return cls(**values)


def _value(field: Any, value: Any, base: Any, path: KeyPath, where: dict[KeyPath, str], problems: list[str]) -> Any:
    kind = field.annotation
    if is_section(kind):
        return value if isinstance(value, kind) else _build(kind, value, base, path, where, problems)
    if isinstance(value, tuple):  # of a configuration made in Python
        value = list(value)
    items = typing.get_args(kind)[0] if typing.get_origin(kind) is list else None
    if items and is_section(items) and isinstance(value, list):
        return [
            v if isinstance(v, items) else _build(items, v, items(), (*path, i), where, problems)
            for i, v in enumerate(value)
        ]
    try:
        return _leaf(field, value)
    except (ValueError, OverflowError) as error:
        hint = f" ({error})" if str(error) else ""
        problems.append(f"{_located(path, where)}: got {_shown(path, value)}, expected {_expected(field)}{hint}")
        return base


def _leaf(field: Any, value: Any) -> Any:
    """Return `value` as the type of `field`; raise ValueError with a hint if it has another type.

    An int is valid for a float; a bool is no number.
    """
    kind = field.annotation
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if value is None:
            return None
        kinds = [k for k in typing.get_args(kind) if k is not type(None)]
        literal = next((k for k in kinds if typing.get_origin(k) is typing.Literal and isinstance(value, str)), None)
        kind = str if isinstance(value, str) and str in kinds else literal or kinds[0]
    if any(isinstance(v, str) and REDACTED in v for v in (value if isinstance(value, list) else [value])):
        raise ValueError("it was hidden when this file was written: give it again")
    if typing.get_origin(kind) is typing.Literal and any(
        value == arg and type(value) is type(arg)
        for arg in typing.get_args(kind)  # 1 == True
    ):
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and (value is None or isinstance(value, str)):
        return value or ""
    if kind == list[str] and (value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value))):
        return value or []
    if typing.get_origin(kind) is list and value is None:
        return []
    if kind == list[float] and isinstance(value, list) and all(is_number(v) for v in value):
        return [_bounded(field, float(v)) for v in value]
    if kind == list[int] and isinstance(value, list) and all(is_number(v) and v % 1 == 0 for v in value):
        return [int(v) for v in value]
    if kind is float and is_number(value):
        return _bounded(field, float(value))
    if kind is int and is_number(value) and math.isfinite(value) and value == int(value):
        return _bounded(field, int(value))
    raise ValueError("put it in quotes" if kind is str and not isinstance(value, (list, dict)) else "")


def _bounded(field: Any, number: float) -> float:
    if not math.isfinite(number) or not all(getattr(operator, sign)(number, bound) for sign, bound in bounds_of(field)):
        raise ValueError
    return number


def _origin(path: KeyPath, where: dict[KeyPath, str]) -> str:
    """Return the origin of the longest prefix of `path` that has one."""
    return next((where[path[:n]] for n in range(len(path), 0, -1) if path[:n] in where), "configuration")


def _located(path: KeyPath, where: dict[KeyPath, str]) -> str:
    return f"{_origin(path, where)}: {_dotted(path)}"


def _dotted(path: KeyPath) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).removeprefix(".")


def _type_name(value: Any) -> str:
    names = {dict: "mapping", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)


def _shown(path: KeyPath, value: Any) -> str:
    if value is None:
        return "nothing"
    if any(is_secret(part) for part in path) and not isinstance(value, (bool, int, float)):
        return f"{REDACTED} ({_type_name(value)})"
    text = str(value).lower() if isinstance(value, bool) else redact_text(repr(value))
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({_type_name(value)})"


def _expected(field: Any) -> str:
    text, null, _ = type_text(field.annotation, long=True).partition(" or null")
    bounds = " and ".join(f"{SIGNS[sign]} {bound:g}" for sign, bound in bounds_of(field))
    unit = f"in {unit_of(field)}" if unit_of(field) else ""
    return ", ".join(part for part in (f"{text} {bounds}".strip(), unit) if part) + null


def _nearest(name: str, names: Any, prefix: str = "") -> str:
    nearest = difflib.get_close_matches(name, list(names), 1) or [n for n in names if name and n.startswith(name)]
    return f"did you mean {' or '.join(prefix + n for n in nearest)}?" if nearest else ""


def _full_names(parts: KeyPath, cls: type[Any]) -> list[str]:
    """Return the keys of `cls` that end in `parts`, else the nearest one."""
    names, suffix = [key.name for key in config_keys(cls)], _dotted(parts)
    exact = sorted((name for name in names if name.endswith(f".{suffix}")), key=len)
    return exact or difflib.get_close_matches(f"{cls.section}.{suffix}", names, 1)


def _unknown(path: KeyPath, owner: type[Any], stage: type[Any] | None) -> str:
    prefix = _dotted(path[:-1])
    # The same name in another section says more than a similar one in this section.
    elsewhere = [n for n in _full_names(path[-1:], stage) if n.endswith(f".{path[-1]}")] if stage else []
    hint = f"did you mean {' or '.join(elsewhere)}?" if elsewhere else ""
    hint = hint or _nearest(str(path[-1]), fields_of(owner), prefix + ".")
    if not hint:
        hint = f"`icegrt {path[0]} --help` lists all"
        if len(fields_of(owner)) <= 12:
            hint = f"the keys of {prefix} are {', '.join(fields_of(owner))}"
    return f"{_dotted(path)} is not a key; {hint}"


def as_dict(config: Any) -> dict[str, Any]:
    """Return the resolved configuration as plain data, with the values of secret keys hidden."""
    return redact(dataclasses.asdict(config))


def as_yaml(config: Any) -> str:
    """Return the resolved configuration as YAML under its section, with the values of secret keys hidden."""
    return dump({config.section: as_dict(config)})


def save(config: Any, path: str | Path) -> None:
    """Write `as_yaml(config)` to `path`, atomically. Hidden values stay hidden: `load` then asks for them again.

    Raises:
        ConfigError: the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, as_yaml(config))
    except OSError as error:
        raise ConfigError(f"cannot write the configuration to {path}: {error.strerror}") from error
