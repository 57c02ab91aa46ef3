"""Check a study before anything runs: its names, its references, its commands and the configuration of every run."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from icegrt.config import SECTIONS, StudyConfig
from icegrt.errors import ConfigError

__all__ = ["check"]

_NAME = re.compile(r"[\w.+=-]+( [\w.+=-]+)*$")
_PLACEHOLDER = re.compile(r"\{(\w*)\}")
_PLACEHOLDERS = {"out", "seed", "setting", "shared"}


def check(config: StudyConfig) -> None:
    """Raise for a study that cannot run.

    Raises:
        ConfigError: lists every problem with its key.
    """
    problems = [*_base(config), *_names(config), *_seeds(config), *_contrasts(config)]
    if not problems and config.base.recipe:
        problems += _recipe(config)
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError(f"{len(problems)} problems in the study:\n  " + "\n  ".join(problems))


def _base(config: StudyConfig) -> Iterator[str]:
    base = config.base
    if bool(base.command) == bool(base.recipe):
        state = "both are" if base.command else "neither is"
        yield f"study.base: {state} given; set either command or recipe"
        return
    if base.command:
        words = yield from _words("study.base.command", base.command, {"out", "seed"})
        if words and words[0] not in ("python", "python3"):
            for n, setting in enumerate(config.settings):
                if setting.ranks > 1:
                    yield f"study.settings[{n}].ranks: {setting.ranks} ranks need a command that begins with python"
    if base.prepare:
        yield from _words("study.base.prepare", base.prepare, {"shared"})
    given = [base.command, *base.overrides, *(word for setting in config.settings for word in setting.overrides)]
    if not base.prepare and any("{shared}" in text for text in given):
        yield "study.base.prepare: not given, and {shared} is its folder; write its command, or drop {shared}"


def _words(key: str, command: str, required: set[str]) -> Iterator[str]:
    """Yield the problems of a command line; return its words."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        yield f"{key}: got {command!r}, which is no command line ({error})"
        return []
    names = {name for word in words for name in _PLACEHOLDER.findall(word)}
    for name in sorted(required - names):
        yield f"{key}: has no {{{name}}}; a run would not know its {'seed' if name == 'seed' else 'folder'}"
    for name in sorted(names - _PLACEHOLDERS):
        yield f"{key}: {{{name}}} is not a placeholder; they are {', '.join(f'{{{n}}}' for n in sorted(_PLACEHOLDERS))}"
    return words


def _names(config: StudyConfig) -> Iterator[str]:
    for key, items in (
        ("settings", config.settings),
        ("measures", config.measures),
        ("contrasts", config.contrasts),
    ):
        if not items:
            yield f"study.{key}: there is none; write at least one"
        for n, item in enumerate(items):
            if not _NAME.match(item.name):
                yield (f"study.{key}[{n}].name: got {item.name!r}, expected letters, digits, _.+=- and single spaces")
        for name in _repeated(item.name for item in items):
            yield f"study.{key}: two are named {name!r}; give each its own name"
    for n, measure in enumerate(config.measures):
        if not measure.field:
            yield f"study.measures[{n}].field: not given; name a field of {measure.file}"


def _seeds(config: StudyConfig) -> Iterator[str]:
    pilot = config.pilot
    if len(config.seeds) < 2:
        yield f"study.seeds: got {config.seeds}; an interval needs at least two"
    for name in _repeated(config.seeds):
        yield f"study.seeds: {name} is given twice"
    if any(seed < 0 for seed in (*config.seeds, *pilot.seeds)):
        yield "study.seeds: a seed is below 0"
    if not pilot.setting:
        if pilot.seeds:
            yield "study.pilot.setting: not given, but pilot.seeds are; name the setting"
        return
    if pilot.setting not in _named(config.settings):
        yield f"study.pilot.setting: {_unknown(pilot.setting, config.settings)}"
    if len(pilot.seeds) < 2 or _repeated(pilot.seeds):
        yield f"study.pilot.seeds: got {pilot.seeds}; a standard deviation needs at least two different seeds"
    shared = sorted(set(pilot.seeds) & set(config.seeds))
    if shared:
        yield f"study.pilot.seeds: {shared} are seeds of the study, too; a pilot needs others"


def _contrasts(config: StudyConfig) -> Iterator[str]:
    for n, contrast in enumerate(config.contrasts):
        key = f"study.contrasts[{n}]"
        for side in ("a", "b"):
            name = getattr(contrast, side)
            if name not in _named(config.settings):
                yield f"{key}.{side}: {_unknown(name, config.settings)}"
        if contrast.a == contrast.b:
            yield f"{key}: a and b are one setting"
        if contrast.measure and contrast.measure not in _named(config.measures):
            yield f"{key}.measure: {_unknown(contrast.measure, config.measures)}"
        if (contrast.expected == "equal") != (contrast.margin > 0):
            yield f"{key}.margin: got {contrast.margin:g}; expected=equal needs a margin above 0, others have none"


def _recipe(config: StudyConfig) -> Iterator[str]:
    """Yield the errors of the recipe with the overrides of each setting."""
    base = config.base
    section = SECTIONS[base.stage]
    for n, setting in enumerate(config.settings):
        try:
            section.load(base.recipe, [*base.overrides, *setting.overrides])
        except ConfigError as error:
            yield f"study.settings[{n}] ({setting.name}): {error}"
            if not setting.overrides:
                return  # the recipe itself


def _named(items: Iterable[Any]) -> list[str]:
    return [item.name for item in items]


def _unknown(name: str, items: Iterable[Any]) -> str:
    return f"got {name!r}, expected one of {', '.join(_named(items)) or 'none'}"


def _repeated(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]
