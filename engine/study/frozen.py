"""The frozen study: no run starts before `frozen.json` holds what was planned.

A study whose configuration or files differ from the frozen ones is refused, unless it is amended. Each amendment is
recorded with its time, its changes and the number of runs that had finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from icegrt.config import StudyConfig
from icegrt.config.loader import as_dict, as_yaml
from icegrt.errors import ConfigError
from icegrt.utils.files import read_object, write_text_atomic
from icegrt.utils.values import flatten

__all__ = ["FROZEN_FILE", "freeze", "now", "write_json"]

FROZEN_FILE = "frozen.json"
# Keys that change neither the runs nor what is concluded from them.
_FREE = ("dir", "page", "parallel", "stop_after", "report_only", "retry_failed", "amend")
_MOST_CHANGES = 12


def freeze(config: StudyConfig, files: Mapping[str, str], finished_runs: int) -> dict[str, Any]:
    """Write the study to `frozen.json` if there is none, or compare it with the one that is there.

    Args:
        config: the checked study.
        files: SHA-256 of each file that it names.
        finished_runs: number of finished runs of the grid.

    Returns:
        The frozen document: `study`, `files`, `sha256` of both, `frozen_at`, `amendments`, and `late`, which maps the
        name of a contrast that was added or changed later to the number of runs that had finished.

    Raises:
        ConfigError: the study differs from the frozen one, and `study.amend` is not set.
    """
    path = Path(config.dir) / FROZEN_FILE
    study = {name: value for name, value in as_dict(config).items() if name not in _FREE}
    document = {"study": study, "files": dict(files)}
    document["sha256"] = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    if not path.exists():
        frozen = document | {"frozen_at": now(), "amendments": [], "late": {}}
        _write(path, config, frozen)
        return frozen
    earlier = read_object(path)
    if earlier["sha256"] == document["sha256"]:
        return earlier
    changes = _changes(earlier, document)
    if not config.amend:
        shown = "; ".join(changes[:4]) + (f"; and {len(changes) - 4} more" if len(changes) > 4 else "")
        raise ConfigError(
            f"{path} froze another study: {shown}. Set study.dir to a new folder, or accept the change with --amend: "
            "the page will list it"
        )
    amendment = {"at": now(), "finished_runs": finished_runs, "changes": changes, "earlier_sha256": earlier["sha256"]}
    frozen = document | {
        "frozen_at": earlier["frozen_at"],
        "amendments": [*earlier["amendments"], amendment],
        "late": earlier["late"] | dict.fromkeys(_new_contrasts(earlier["study"], study), finished_runs),
    }
    _write(path, config, frozen)
    return frozen


def _write(path: Path, config: StudyConfig, frozen: dict[str, Any]) -> None:
    write_text_atomic(path.with_name("study.yaml"), as_yaml(config))
    write_json(path, frozen)


def _changes(earlier: dict[str, Any], document: dict[str, Any]) -> list[str]:
    """Return one text for each key that changed, at most _MOST_CHANGES."""
    before, after = ({**_leaves(d["study"], "study"), **_leaves(d["files"], "file")} for d in (earlier, document))
    changes = []
    for name in {**before, **after}:
        if before.get(name) == after.get(name):
            continue
        if name.startswith("file."):
            changes.append(f"{name.removeprefix('file.')} has other contents")
        elif name not in before:
            changes.append(f"{name} is new: {_short(after[name])}")
        elif name not in after:
            changes.append(f"{name} is gone (was {_short(before[name])})")
        else:
            changes.append(f"{name} was {_short(before[name])}, now is {_short(after[name])}")
    more = len(changes) - _MOST_CHANGES
    return changes[:_MOST_CHANGES] + ([f"{more} more keys"] if more > 0 else [])


def _leaves(values: Any, prefix: str) -> dict[str, Any]:
    """Return the values by dotted name; an item of a list is under its own name, where it has one."""
    leaves = {}
    for name, value in flatten(values, prefix):
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for n, item in enumerate(value):
                rest = {key: v for key, v in item.items() if key != "name"}
                leaves |= _leaves(rest, f"{name}[{item.get('name', n)}]")
        else:
            leaves[name] = value
    return leaves


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _new_contrasts(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the names of contrasts that are new, or whose definition or measure changed."""
    old = [_definition(contrast, before) for contrast in before["contrasts"]]
    return [c["name"] for c in after["contrasts"] if _definition(c, after) not in old]


def _definition(contrast: dict[str, Any], study: dict[str, Any]) -> Any:
    measures = [m for m in study["measures"] if m["name"] == contrast["measure"]] or study["measures"][:1]
    return [contrast, measures]


def write_json(path: Path, document: Any) -> None:
    """Write a document as indented JSON, atomically."""
    write_text_atomic(path, json.dumps(document, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def now() -> str:
    """Return the time as text, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
