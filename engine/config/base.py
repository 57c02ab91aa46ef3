"""The parts of a configuration class: keys with their meaning, loading and saving."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from typing_extensions import Self, dataclass_transform

from icegrt.config import loader
from icegrt.config.introspect import register

CONFIG_FILE = "config.yaml"  # the saved configuration in a run's folder

T = TypeVar("T")

if TYPE_CHECKING:

    class Section(Generic[T]):
        """A key that holds a section: the constructor takes an instance or a mapping of its keys."""

        def __get__(self, config: object, owner: object = None) -> T: ...

        def __set__(self, config: object, value: T | Mapping[str, Any]) -> None: ...

    class SectionList(Generic[T]):
        """A key that holds a list of sections: the constructor takes instances or mappings of their keys."""

        def __get__(self, config: object, owner: object = None) -> list[T]: ...

        def __set__(self, config: object, value: Sequence[T | Mapping[str, Any]]) -> None: ...

else:
    # pydantic reads the plain annotations, and builds sections from mappings.
    class Section:
        def __class_getitem__(cls, item: type) -> type:
            return item

    SectionList = list


# `key` is no field specifier here: type checkers know the default of a specifier by keyword only.
@dataclass_transform(kw_only_default=True, frozen_default=True)
def config_class(cls: type[T]) -> type[T]:
    """Make a frozen, keyword-only dataclass of `cls`. Its constructor checks values as the loader checks a file's.

    The constructor raises `ConfigError` for a key that is unknown, mistyped or out of bounds.
    """
    options = ConfigDict(extra="forbid", validate_default=False)
    config = cast("Any", dataclass(frozen=True, kw_only=True, config=options)(cls))
    set_values = config.__init__

    @functools.wraps(set_values)
    def __init__(self: Any, **values: Any) -> None:
        set_values(self, **loader.checked_values(config, values))

    config.__init__ = __init__
    return cast("type[T]", config)


def key(default: Any, help: str, *, unit: str = "", **bounds: Any) -> Any:
    """Return the field of a configuration key: default, meaning, unit and bounds (`ge`, `gt`, `le`, `lt`)."""
    extra: dict[str, Any] = {"unit": unit}
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        # Every instance gets a copy: a shared list would carry one configuration's changes into the next.
        return Field(
            default_factory=lambda: copy.deepcopy(default), description=help, json_schema_extra=extra, **bounds
        )
    return Field(default=default, description=help, json_schema_extra=extra, **bounds)


class Loadable:
    """A configuration of a command, which can be loaded and saved. `section` is its name in a recipe file."""

    section: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register(cls.section, cls)

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Sequence[str] = ()) -> Self:
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
