"""Where in the code an operation comes from: the innermost frame that is neither torch's nor the rehearsal's."""

from __future__ import annotations

import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

_HERE = str(Path(__file__).resolve().parent)
_PACKAGE = Path(__file__).resolve().parent.parent
# Optimizers of torch are code that a reader of the report wants to see; the rest of torch is machinery.
_SHOWN_OF_TORCH = "/torch/optim/"
_HIDDEN = ("/torch/", "/contextlib.py", "/functools.py", "/unittest/")


class Site(NamedTuple):
    """A line of code.

    Attributes:
        file: path from its package on, for example "icegrt/roles/role.py".
        line: from 1.
        function: name.
    """

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


NOWHERE = Site("?", 0, "?")
_file_of_code: dict[CodeType, str | None] = {}
_sites: dict[tuple[CodeType, int | None], Site] = {}


def current_site() -> Site:
    """Return the innermost line that is shown; calls from the same line are equal."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        file = _file_of_code.get(code, "")
        if file == "":
            file = _file_of_code[code] = _shown_file(code.co_filename)
        if file is not None:
            key = code, frame.f_lineno
            site = _sites.get(key)
            if site is None:
                site = _sites[key] = Site(file, frame.f_lineno or 0, code.co_name)
            return site
        frame = frame.f_back
    return NOWHERE


def _shown_file(path: str) -> str | None:
    """Return the path as the report shows it, or None for a frame that it skips."""
    if path.startswith("<"):
        return None
    resolved = str(Path(path).resolve())
    is_own_tool = resolved.startswith(_HERE) and not resolved.endswith("/driver.py")
    if is_own_tool or resolved.endswith("/distributed/cpu_backend.py"):
        return None
    if _SHOWN_OF_TORCH not in resolved and any(part in resolved for part in _HIDDEN):
        return None
    for folder, package in ((_PACKAGE, "icegrt"), (_PACKAGE.parent / "kernels", "icegrt/kernels")):
        if resolved.startswith(f"{folder}/"):
            return f"{package}/{resolved[len(str(folder)) + 1 :]}"
    return resolved.rpartition("site-packages/")[2]
