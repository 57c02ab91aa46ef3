"""What a configuration class is made of: keys with their meaning, loading and saving."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from icegrt.config import loader
from icegrt.config.introspect import SECTIONS

_STRICT = ConfigDict(extra="forbid", validate_default=False)


config_class = dataclass(frozen=True, kw_only=True, config=_STRICT)


def key(default: Any, help: str, *, unit: str = "", **bounds: Any) -> Any:
    """A configuration key: its default, what it means, the unit of a number, and bounds (`ge`, `gt`, `le`, `lt`)."""
    extra = {"unit": unit}
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        # A copy for each instance: a list given out twice would carry one configuration's rows into the next.
        return Field(
            default_factory=lambda: copy.deepcopy(default), description=help, json_schema_extra=extra, **bounds
        )
    return Field(default=default, description=help, json_schema_extra=extra, **bounds)


class Loadable:
    """What every stage's configuration can do. `section` is its name in a recipe file."""

    section = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        SECTIONS[cls.section] = cls

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Sequence[str] = ()):
        """Read `path` (YAML, optional) and apply dotted `overrides`. Raises `ConfigError` naming the key at fault."""
        return loader.load(cls, path, overrides)

    def save(self, path: str | Path) -> None:
        """Write the resolved configuration as YAML, under its section, ready to be loaded again."""
        loader.save(self, path)
