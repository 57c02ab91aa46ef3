"""The keys of a YAML file as overrides of another one."""

import json
from pathlib import Path

from icegrt.config.strict_yaml import parse
from icegrt.errors import UserError
from icegrt.utils.values import flatten

__all__ = ["read_overrides"]


def read_overrides(path: Path, section: str) -> list[str]:
    """Return the keys of a YAML file with the one section `section` as overrides, such as `ppo.optimizer.lr=0.001`.

    Raises:
        UserError: the file has another section, or lacks this one.
    """
    document = parse(path.read_text(encoding="utf-8"), str(path)) or {}
    if set(document) != {section}:
        raise UserError(f"{path}: expected the section {section} alone, got {', '.join(map(str, document)) or 'none'}")
    keys = document[section]
    return [f"{name}={json.dumps(value)}" for name, value in flatten(keys, section)] if keys else []
