"""The parts of a configuration class: keys with their meaning, loading and saving."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, dataclass_transform

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from icegrt.config import loader
from icegrt.config.introspect import SECTIONS

CONFIG_FILE = "config.yaml"  # the saved configuration in a run's folder


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def config_class(cls: type) -> Any:
    """Make `cls` a frozen class of configuration keys. Its constructor checks values as the loader checks a file's.

    The constructor raises `ConfigError` for a key that is unknown, mistyped or out of bounds.
    """
    cls = dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", validate_default=False))(cls)
    set_values = cls.__init__

    @functools.wraps(set_values)
    def __init__(self: Any, **values: Any) -> None:
        set_values(self, **loader.checked_values(cls, values))

    cls.__init__ = __init__
    return cls


def key(default: Any, help: str, *, unit: str = "", **bounds: Any) -> Any:
    """Return the field of a configuration key: default, meaning, unit and bounds (`ge`, `gt`, `le`, `lt`)."""
    extra = {"unit": unit}
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        # Every instance gets a copy: a shared list would carry one configuration's changes into the next.
        return Field(
            default_factory=lambda: copy.deepcopy(default), description=help, json_schema_extra=extra, **bounds
        )
    return Field(default=default, description=help, json_schema_extra=extra, **bounds)


class Loadable:
    """A configuration of a command, which can be loaded and saved. `section` is its name in a recipe file."""

    section = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        SECTIONS[cls.section] = cls

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Sequence[str] = ()):
        """Read a configuration and return it.

        Args:
            path: a YAML file with a section of this command; None: the defaults.
            overrides: texts `section.key=value`, applied in order.

        Raises:
            ConfigError: lists every problem with its file and line and its key.
        """
        return loader.load(cls, path, overrides)

    def save(self, path: str | Path) -> None:
        """Write the resolved configuration as YAML, under its section; `load` reads it again.

        Raises:
            ConfigError: the file cannot be written.
        """
        loader.save(self, path)
