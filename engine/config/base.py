"""What a configuration class is made of: keys with their meaning, loading and saving."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from typing_extensions import Self, dataclass_transform

from icegrt.config import loader
from icegrt.config.introspect import SECTIONS

_STRICT = ConfigDict(extra="forbid", validate_default=False)

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


# Type checkers must not learn of `key`: they would take its first argument for something else than a default.
@dataclass_transform(kw_only_default=True, frozen_default=True)
def config_class(cls: type[T]) -> type[T]:
    """Make a frozen, keyword-only dataclass of `cls` that refuses unknown keys."""
    return cast("type[T]", dataclass(frozen=True, kw_only=True, config=_STRICT)(cls))


def key(default: Any, help: str, *, unit: str = "", **bounds: Any) -> Any:
    """A configuration key: its default, what it means, the unit of a number, and bounds (`ge`, `gt`, `le`, `lt`)."""
    extra: dict[str, Any] = {"unit": unit}
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        # A copy for each instance: a list given out twice would carry one configuration's rows into the next.
        return Field(
            default_factory=lambda: copy.deepcopy(default), description=help, json_schema_extra=extra, **bounds
        )
    return Field(default=default, description=help, json_schema_extra=extra, **bounds)


class Loadable:
    """What every stage's configuration can do. `section` is its name in a recipe file."""

    section: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        SECTIONS[cls.section] = cls

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Sequence[str] = ()) -> Self:
        """Read `path` (YAML, optional) and apply dotted `overrides`. Raises `ConfigError` naming the key at fault."""
        return loader.load(cls, path, overrides)

    def save(self, path: str | Path) -> None:
        """Write the resolved configuration as YAML, under its section, ready to be loaded again."""
        loader.save(self, path)
