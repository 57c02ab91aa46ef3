"""YAML as the configuration means it: the plain scalars of YAML 1.2, no key twice, every key's line known."""

from __future__ import annotations

import re
import typing
from typing import Any

import yaml

from icegrt.errors import ConfigError

_STR, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_INT = re.compile(r"[-+]?[0-9][0-9_]*$")
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$")


class _Loader(yaml.SafeLoader):
    """1e-4 is a number (PyYAML says text), only true and false are booleans, and 1:30 and a date stay text."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or `_Loader` would take for something else, so that it comes back as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in (
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("float", _NOT_FINITE, "-+."),
    ("merge", re.compile(r"<<$"), "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))


def _float(loader: yaml.Loader, node: yaml.ScalarNode) -> float:
    return float(node.value.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))


# PyYAML's own constructors read 010 as 8 and 1:30 as 90.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value.replace("_", "")))
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


def parse(text: str, origin: str, lines: dict[tuple, int] | None = None) -> Any:
    """The document `text` as plain data with text keys. `lines` takes the line of every key and list item by its path.

    Raises `ConfigError` that begins with `origin` (and, if `lines` is given, the line) for anything but one document of
    valid YAML without duplicate keys. Only plain data is built: no tag can name a Python object.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_keys(node, set())
            data = loader.construct_document(node)
        finally:
            loader.dispose()
        if lines is not None:
            _note_lines(node, (), lines, set())
        return data
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{origin}:{mark.line + 1}" if mark and lines is not None else origin
        raise ConfigError(f"{at}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{origin}: not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigError(f"{origin}: not valid YAML: nested too deeply") from None


def _check_keys(node: yaml.Node, seen: set[int]) -> None:
    """Refuse keys that are no text or come twice; before merge keys (<<) are flattened, as those may be overridden."""
    if id(node) in seen:
        return
    seen.add(id(node))
    keys = set()
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        if isinstance(child, tuple):
            key, child = child
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key.start_mark)
            if key.value in keys:
                problem = f"the key `{key.value}` is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            keys.add(key.value)
            key.tag = key.tag if key.tag == _MERGE else _STR
        _check_keys(child, seen)


def _note_lines(node: yaml.Node, path: tuple, lines: dict[tuple, int], seen: set[int]) -> None:
    if id(node) in seen:  # an alias: its keys report the line of what holds it
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        children = [(key.value, key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(i, value, value) for i, value in enumerate(node.value)]
    else:
        return
    for name, mark, value in children:
        child_path = (*path, name)
        lines[child_path] = mark.start_mark.line + 1
        _note_lines(value, child_path, lines, seen)


def dump(data: Any) -> str:
    """`data` as YAML that `parse` gives back unchanged, keys in the order given."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
