"""What a configuration class looks like to people: rows of keys, help text, and the page `docs/configuration.md`."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any

from icegrt.config.schema import STAGES

SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def fields_of(cls: type) -> dict[str, Any]:
    """The keys of a configuration class; their annotations are resolved types."""
    return cls.__pydantic_fields__


def bounds_of(field: Any) -> list[tuple[str, float]]:
    """The bounds of a key as pairs such as ("ge", 0)."""
    return [(s, getattr(m, s)) for m in field.metadata for s in SIGNS if getattr(m, s, None) is not None]


def unit_of(field: Any) -> str:
    """The unit of a key, or an empty text."""
    return (field.json_schema_extra or {}).get("unit", "")


@dataclasses.dataclass(frozen=True)
class Row:
    """One key as help and documentation show it."""

    name: str
    type: str
    default: str
    unit: str
    bounds: str
    help: str


def type_text(kind: Any, long: bool = False) -> str:
    """The type in words: short for tables, long for sentences."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        words = [str(arg).lower() if isinstance(arg, bool) else arg for arg in args]
        return f"one of {', '.join(words)}" if long else " | ".join(words)
    if origin is list:
        plain = {str: "text", float: "numbers", int: "whole numbers"}
        item = "{" + ", ".join(fields_of(args[0])) + "}" if dataclasses.is_dataclass(args[0]) else plain[args[0]]
        return f"a list of {item}" if long else f"list of {item}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if k is type(None) else type_text(k, long) for k in args)
    short = {str: "text", bool: "bool", int: "int", float: "float"}
    sentence = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
    return (sentence if long else short)[kind]


def _default_text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return '""' if value == "" else str(value)


def rows(cls: type, base: Any = None, prefix: str = "") -> list[Row]:
    """Every key of `cls`, nested ones flattened with dots, with the default that this stage gives it."""
    return list(_rows(cls, cls() if base is None else base, prefix or cls.section))


def _rows(cls: type, base: Any, prefix: str) -> Iterator[Row]:
    for key, field in fields_of(cls).items():
        kind, name, default = field.annotation, f"{prefix}.{key}", getattr(base, key)
        if dataclasses.is_dataclass(kind):
            yield from _rows(kind, default, name)
            continue
        bounds = ", ".join(f"{SIGNS[sign]} {bound:g}" for sign, bound in bounds_of(field))
        yield Row(name, type_text(kind), _default_text(default), unit_of(field), bounds, field.description or "")
        item = typing.get_args(kind)[0] if typing.get_origin(kind) is list else None
        if item and dataclasses.is_dataclass(item):
            yield from _rows(item, item(), f"{name}[]")


def help_text(cls: type) -> str:
    """Every key with type, default, unit, bounds and meaning, as plain text."""
    lines = []
    for row in rows(cls):
        notes = ", ".join(part for part in (row.unit, row.bounds) if part)
        lines.append(f"  {row.name}: {row.type} = {row.default}" + (f"  [{notes}]" if notes else ""))
        lines.append(f"      {row.help}")
    return "\n".join(lines)


_INTRODUCTION = """\
# Configuration

This page is written by `python -m icegrt.config_help > docs/configuration.md`. `icegrt COMMAND --help` prints one
command's keys.

A recipe is one YAML file whose sections are named after the commands. Each command reads its own section and leaves
the others alone, so one file can hold the whole recipe:

```yaml
sft:
  model: path/to/base
  data: [{path: instructions.jsonl, weight: 1}]
ppo:
  actor: runs/sft/final
  optimizer: {lr: 1e-5}
```

Overrides come after the file and name the section first; the last one wins:

```bash
icegrt ppo recipe.yaml ppo.kl_coef=0.1 ppo.optimizer.lr=1e-4
icegrt sft recipe.yaml 'sft.data=[{path: a.jsonl, weight: 1}, {path: b.jsonl, weight: 0.5}]'
icegrt ppo recipe.yaml --print-config        # the resolved configuration, as YAML
```

* Values are YAML: `1e-4` is a number, only `true` and `false` are booleans, `null` is nothing. Where a key takes text,
  an override takes what follows `=` as it stands.
* A nested section that is given in part keeps the command's defaults for the rest. A list is replaced as a whole.
* Relative paths start at the current directory, not at the file. Neither `~` nor environment variables are expanded.
* An unknown section or key, a key given twice, a value of the wrong type or out of bounds is an error that names the
  file and line, and nothing is run.
* Secrets are hidden wherever a configuration is saved, printed or sent to a logger: texts under keys that name a token,
  secret, password or API key (`hub_token`, but not `token_budget` or `stop_token`), and passwords inside URLs.

In Python: `PPOConfig.load("recipe.yaml", ["ppo.kl_coef=0.1"])`. Objects are frozen; `dataclasses.replace` makes others.
"""


def markdown() -> str:
    """`docs/configuration.md`."""
    parts = [_INTRODUCTION]
    for section, cls in STAGES.items():
        parts.append(f"\n## {section}\n\n{(cls.__doc__ or '').strip()}\n\n| key | type | default | unit | meaning |")
        parts.append("|---|---|---|---|---|")
        for row in rows(cls):
            bounds = f" ({row.bounds})" if row.bounds else ""
            cells = (f"`{row.name}`", row.type + bounds, f"`{row.default}`", row.unit, row.help)
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
