"""Read and write YAML with the plain scalars of YAML 1.2, without duplicate keys, and with the line of every key."""

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
    """A loader for which 1e-4 is a number, only true and false are booleans, and 1:30 and a date are text."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes text which YAML 1.1 or `_Loader` would read as another type."""

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


# PyYAML 6 reads 010 as 8 and 1:30 as 90, as YAML 1.1 does. These constructors read decimal numbers only.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value.replace("_", "")))
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


def parse(text: str, origin: str, lines: dict[tuple, int] | None = None) -> Any:
    """Return the document `text` as plain data with text keys. No tag can create a Python object.

    Args:
        text: one YAML document.
        origin: the file or option, which begins an error message.
        lines: receives the line of every key and list item, by its path.

    Raises:
        ConfigError: the text is not one valid document, or a key is a duplicate.
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
            _record_lines(node, (), lines, set())
        return data
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{origin}:{mark.line + 1}" if mark and lines is not None else origin
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{origin}: not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigError(f"{origin}: not valid YAML: nested too deeply") from None


def _check_keys(node: yaml.Node, seen: set[int]) -> None:
    """Raise for keys that are no text or duplicates. Runs before merge keys (<<), whose values may be overridden."""
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


def _record_lines(node: yaml.Node, path: tuple, lines: dict[tuple, int], seen: set[int]) -> None:
    if id(node) in seen:  # an alias: errors in its keys report the line of the key above it
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
        _record_lines(value, child_path, lines, seen)


def dump(data: Any) -> str:
    """Return `data` as YAML, keys in their order; `parse` restores it unchanged."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
