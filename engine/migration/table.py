"""A table from the keys of another library to ours, and the conversion of one of its configurations by the table.

The table is the only source: `icegrt migrate` converts by it, and docs/migrating.md shows it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from icegrt.config import PPOConfig
from icegrt.config.strict_yaml import dump, parse
from icegrt.errors import ConfigError
from icegrt.utils.redaction import REDACTED, is_secret
from icegrt.utils.values import is_number

Kind = Literal["int", "number", "bool", "text", "any"]
_KINDS = {
    "int": "a whole number",
    "number": "a number",
    "bool": "true or false",
    "text": "text",
    "any": "a value",
}


class NoEquivalentError(Exception):
    """A value has no equivalent; the message is the reason."""


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        keys: keys of the other library: one, or several that share a reason for having no equivalent.
        default: value of an absent key.
        ours: keys of the `ppo` section that `convert` returns, in its order; none: no equivalent.
        note: what differs, or why there is no equivalent.
        kind: type of a value that is not null.
        convert: returns the values of `ours`; None for one of them leaves our default. It may raise
            `NoEquivalentError`.
        reports_difference: whether `icegrt migrate` prints the note if a file has the key.
    """

    keys: tuple[str, ...]
    default: Any = None
    ours: tuple[str, ...] = ()
    note: str = ""
    kind: Kind = "any"
    convert: Callable[[Settings], tuple[Any, ...]] | None = None
    reports_difference: bool = False


def same(key: str, default: Any, kind: Kind, *ours: str, note: str = "", reported: bool = False) -> Row:
    """Return the row of a key whose value is that of our keys `ours`, unchanged."""
    return Row((key,), default, ours, note, kind, lambda settings: (settings[key],) * len(ours), reported)


def no_equivalent(keys: str, why: str, default: Any = None) -> Row:
    """Return the row of keys (separated by spaces) without an equivalent.

    A value other than `default`, null, false and an empty one is reported.
    """
    return Row(tuple(keys.split()), default, note=why)


@dataclass(frozen=True)
class Settings:
    """A configuration of the other library.

    Attributes:
        path: the file.
        given: its keys and values.
        lines: line of each key.
        defaults: values of absent keys.
        world_size: processes of the other library's run; None: as the file says.
        dataset_size: prompts of its data set; None: unknown.
    """

    path: Path
    given: Mapping[str, Any]
    lines: Mapping[str, int]
    defaults: Mapping[str, Any]
    world_size: int | None = None
    dataset_size: int | None = None

    def __getitem__(self, key: str) -> Any:
        """Return the value of a key, or its default."""
        return self.given.get(key, self.defaults[key])

    def where(self, key: str) -> str:
        """Return the file and line of a key."""
        return f"{self.path}:{self.lines[key]}" if key in self.lines else f"{self.path}"


@dataclass(frozen=True)
class Finding:
    """A key of the other library that was not converted, or not exactly: its place, value and the reason."""

    where: str
    key: str
    value: Any
    reason: str

    def __str__(self) -> str:
        """Return the finding as one line."""
        hidden = is_secret(self.key) and isinstance(self.value, str)
        return f"{self.where}: {self.key}={REDACTED if hidden else _text(self.value)}: {self.reason}"


@dataclass
class Migration:
    """A converted configuration.

    Attributes:
        values: keys of the `ppo` section with their values.
        different: keys that are converted, but mean something else here.
        missing: keys without an equivalent.
    """

    values: dict[str, Any] = field(default_factory=dict)
    different: list[Finding] = field(default_factory=list)
    missing: list[Finding] = field(default_factory=list)

    def nested(self) -> dict[str, Any]:
        """Return the values with a mapping for each section."""
        return _nested(self.values)

    def yaml(self) -> str:
        """Return the text of a configuration file."""
        return dump({"ppo": self.nested()})


def read_settings(path: Path, rows: Sequence[Row], library: str, **options: Any) -> Settings:
    """Return the configuration in a YAML or JSON file.

    Args:
        path: the file, with the library's keys at its top.
        rows: the table; it knows every key.
        library: name of the library, for messages.
        options: further fields of `Settings`.

    Raises:
        ConfigError: the file cannot be read, a key is not in the table, or a value has another type.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    lines: dict[tuple, int] = {}
    document = parse(text, str(path), lines)
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected the keys of {library} with their values, got {type(document).__name__}")
    known = {key: row for row in rows for key in row.keys}
    problems = []
    for key, value in document.items():
        where = f"{path}:{lines[(key,)]}"
        if key not in known:
            nearest = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {nearest[0]}?" if nearest else "docs/migrating.md lists all; remove it"
            problems.append(f"{where}: `{key}` is not a key of {library}; {hint}")
        elif value is not None and not _has_kind(value, known[key].kind):
            problems.append(f"{where}: {key}: got {_text(value)}, expected {_KINDS[known[key].kind]}")
    if problems:
        raise ConfigError("\n  ".join([f"{path} cannot be converted:", *problems]) if problems[1:] else problems[0])
    defaults = {key: row.default for key, row in known.items()}
    numbers = {path[0]: line for path, line in lines.items() if len(path) == 1}
    return Settings(path, document, numbers, defaults, **options)


def migrate(rows: Iterable[Row], settings: Settings) -> Migration:
    """Return the configuration of a run like that of `settings`.

    Raises:
        ConfigError: a value is out of bounds here; the message has the key, and its file and line.
    """
    migration = Migration()
    for row in rows:
        given = [key for key in row.keys if key in settings.given]
        if row.convert is None:
            unusual = [key for key in given if _matters(settings[key], row.default)]
            migration.missing += [Finding(settings.where(k), k, settings[k], row.note) for k in unusual]
            continue
        key = row.keys[0]
        try:
            converted = row.convert(settings)
        except NoEquivalentError as reason:
            migration.missing.append(Finding(settings.where(key), key, settings[key], str(reason)))
            continue
        values = {name: value for name, value in zip(row.ours, converted, strict=True) if value is not None}
        try:
            PPOConfig(**_nested({name.removeprefix("ppo."): value for name, value in values.items()}))
        except ConfigError as error:
            problem = str(error).removeprefix("configuration: ")
            raise ConfigError(f"{settings.where(key)}: {key}={_text(settings[key])}: {problem}") from None
        migration.values |= {name.removeprefix("ppo."): value for name, value in values.items()}
        if row.reports_difference and given and values and _matters(settings[key], row.default):
            migration.different.append(Finding(settings.where(key), key, settings[key], row.note))
    return migration


def markdown(rows: Iterable[Row]) -> str:
    """Return the table as docs/migrating.md shows it."""
    lines = ["| key | default | icegrt | what differs |", "|---|---|---|---|"]
    for row in rows:
        keys = ", ".join(key if key.startswith("(") else f"`{key}`" for key in row.keys)
        ours = ", ".join(f"`{key}`" for key in row.ours) or "no equivalent"
        default = "" if row.keys[0].startswith("(") or row.keys[1:] else f"`{_text(row.default)}`"
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in (keys, default, ours, row.note)) + " |")
    return "\n".join(lines)


def _has_kind(value: Any, kind: Kind) -> bool:
    checks = {
        "int": lambda: is_number(value) and math.isfinite(value) and value == int(value),
        "number": lambda: is_number(value) and math.isfinite(value),
        "bool": lambda: isinstance(value, bool),
        "text": lambda: isinstance(value, str),
        "any": lambda: True,
    }
    return checks[kind]()


def _matters(value: Any, default: Any) -> bool:
    """Return whether a value asks for something: it is neither the default, nor empty, nor false."""
    return value != default and value not in (None, False, "", [], {})


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *sections, key = name.split(".")
        section = nested
        for part in sections:
            section = section.setdefault(part, {})
        section[key] = value
    return nested


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
