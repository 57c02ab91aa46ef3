"""`icegrt doctor`: what this machine has, what the engine lacks, and what to do about it.

Each check is a function that returns one `Check` and never raises: a broken package is a finding like any other. Only
the standard library is imported up front, so that it runs where everything else is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import platform
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata

from icegrt.utils import console

OK, NOTE, FAIL = "ok", "note", "FAIL"  # a note costs speed or a feature; a failure stops the engine
_GIB = 2**30
_ENGINE = "pip install 'icegrt[engine]'"


@dataclasses.dataclass(frozen=True)
class Check:
    """One finding: what was looked at, what was found, how bad it is, and what to do."""

    name: str
    found: str
    status: str = OK
    advice: str = ""


@dataclasses.dataclass(frozen=True)
class Package:
    """A dependency with the versions that it is tested in: from `low` up to, not including, `below`."""

    name: str
    low: tuple[int, ...] = ()
    below: tuple[int, ...] = ()
    required: bool = True
    advice: str = _ENGINE
    without: str = ""


PACKAGES = (
    Package("torch", (2, 11), advice="install torch >= 2.11 (pytorch.org has the command for your driver)"),
    Package(
        "triton", (3, 6), (4,), required=False, without="kernels run as plain PyTorch", advice="pip install triton"
    ),
    Package("megatron-core", (0, 16), (0, 17), advice="pip install 'megatron-core>=0.16.1,<0.17'"),
    Package("transformers", (5,), (6,)),
    Package("safetensors"),
    Package("pydantic", (2, 10), (3,)),
    Package("pyyaml"),
    Package("rich", required=False, without="plain lines instead of progress bars", advice=_ENGINE),
    Package(
        "flash-attn",
        required=False,
        without="attention uses PyTorch's SDPA",
        advice="optional, with a GPU: pip install flash-attn",
    ),
)


def main(as_json: bool = False) -> int:
    """Print the findings. Returns 0 if the engine can run here and 1 if not."""
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print must not get into the report
        checks = examine()
    failures = [check for check in checks if check.status == FAIL]
    if as_json:
        report = {"ok": not failures, "checks": [dataclasses.asdict(check) for check in checks]}
        print(json.dumps(report, indent=2))
        return 1 if failures else 0
    console.table(["check", "status", "found", "what to do"], [(c.name, c.status, c.found, c.advice) for c in checks])
    print()
    if not failures:
        print("the engine can run here")
        return 0
    print("the engine cannot run here:")
    for check in failures:
        print(f"  {check.name}: {check.found}" + (f"; {check.advice}" if check.advice else ""))
    return 1


def examine() -> list[Check]:
    """Every check, in the order shown."""
    checks = [python(), system(), processors(), memory()]
    checks += [package(p) for p in PACKAGES]
    checks += run_check("devices", devices, "reinstall torch")
    checks += run_check("distributed", distributed, "reinstall torch")
    checks += [extension()]
    checks += run_check("kernels", kernels, "check ICEGRT_BACKEND, which names backends, if it is set")
    checks += [disk()]
    checks += [forward_pass()]
    return checks


def run_check(name: str, check: Callable[[], Iterable[Check]], advice: str) -> list[Check]:
    """Return the results of `check`, or one result with the reason if it raises."""
    try:
        return list(check())
    except ImportError as error:
        return [Check(name, f"not checked: {_first_line(error)}", NOTE, "see the packages above")]
    except Exception as error:  # whatever a broken installation throws is the finding
        return [Check(name, _first_line(error), FAIL, advice)]


def python() -> Check:
    """The interpreter."""
    fine = sys.version_info >= (3, 10)
    return Check("Python", platform.python_version(), OK if fine else FAIL, "" if fine else "use Python 3.10 or newer")


def system() -> Check:
    """The operating system; only Linux is tested."""
    linux = sys.platform.startswith("linux")
    return Check("platform", platform.platform(), OK if linux else NOTE, "" if linux else "only Linux is tested")


def processors() -> Check:
    """Cores that this process may use, which a container can make fewer than the machine has."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Check("CPU", f"{usable} cores usable of {os.cpu_count()}")


def memory() -> Check:
    """Main memory of the machine."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return Check("memory", "unknown", NOTE)
    few = total < 4 * _GIB
    return Check("memory", f"{total / _GIB:.1f} GiB", NOTE if few else OK, "only tiny models will fit" if few else "")


def package(wanted: Package) -> Check:
    """Whether a package is installed, in a version that the engine supports."""
    try:
        found = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        lacks = "not installed" + (f": {wanted.without}" if wanted.without else "")
        return Check(wanted.name, lacks, FAIL if wanted.required else NOTE, wanted.advice)
    version = _version(found)
    if (wanted.low and version < wanted.low) or (wanted.below and version >= wanted.below):
        span = f">= {_dots(wanted.low)}" + (f", < {_dots(wanted.below)}" if wanted.below else "")
        advice = f"supported: {span}" + (f"; {wanted.advice}" if wanted.advice else "")
        return Check(wanted.name, found, FAIL if wanted.required else NOTE, advice)
    return Check(wanted.name, found)


def devices() -> Iterable[Check]:
    """CUDA devices with name, compute capability and memory."""
    import torch

    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device is visible"
        yield Check("GPU", f"none: {why}", NOTE, "the same code runs on CPU, for small models")
        return
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        old = (p.major, p.minor) < (8, 0)
        found = f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / _GIB:.0f} GiB, CUDA {torch.version.cuda}"
        yield Check(f"GPU {i}", found, NOTE if old else OK, "kernels are compiled and tested from sm_80" if old else "")


def distributed() -> Iterable[Check]:
    """The backends that torch.distributed was built with: gloo is always needed, NCCL with more than one GPU."""
    import torch
    import torch.distributed as dist

    available = dist.is_available()
    has = {"gloo": available and dist.is_gloo_available(), "nccl": available and dist.is_nccl_available()}
    found = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in has.items())
    if not has["gloo"]:
        yield Check("distributed", found, FAIL, "install a torch with gloo: every run joins a gloo group")
    elif torch.cuda.is_available() and not has["nccl"]:
        yield Check("distributed", found, FAIL, "install a torch with NCCL to use the GPU")
    else:
        yield Check("distributed", found)


def extension() -> Check:
    """The compiled extension."""
    advice = "make install (needs a C++17 compiler and CMake)"
    try:
        importlib.import_module("icegrt._C")
    except ModuleNotFoundError:
        return Check("icegrt._C", "not built", FAIL, advice)
    except ImportError as error:
        return Check("icegrt._C", f"does not load: {_first_line(error)}", FAIL, f"build it again: {advice}")
    return Check("icegrt._C", "built")


def kernels() -> Iterable[Check]:
    """The backend that each kernel takes here, kernels of one backend in one line."""
    import torch

    dispatch = importlib.import_module("icegrt.kernels.dispatch")
    described: Mapping[str, str] = dispatch.describe("cuda" if torch.cuda.is_available() else "cpu")
    by_backend: dict[str, list[str]] = {}
    for name, backend in described.items():
        by_backend.setdefault(backend, []).append(name)
    for backend, names in by_backend.items():
        yield Check(f"kernels: {backend}", ", ".join(names))


def disk() -> Check:
    """Space where runs are written by default."""
    free = shutil.disk_usage(".").free
    few = free < 5 * _GIB
    advice = "little room for checkpoints: free some, or set run.dir to another disk" if few else ""
    return Check("disk here", f"{free / _GIB:.1f} GiB free", NOTE if few else OK, advice)


def forward_pass() -> Check:
    """A forward pass of a two-layer model through Megatron: the proof that the parts work together."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = importlib.import_module("icegrt.model.selftest").run()
    except ModuleNotFoundError as error:
        return Check("forward pass", f"needs {error.name}, which is not installed", FAIL, "see the packages above")
    except Exception as error:  # the point of the test is to learn what happens
        found = f"{type(error).__name__}: {_first_line(error)}"
        return Check("forward pass", found, FAIL, "put right what fails above; if nothing does, report this")
    return Check("forward pass", f"{result} ({time.perf_counter() - start:.1f} s)")


def _version(text: str) -> tuple[int, ...]:
    """The release numbers: 2.13.0+cpu is (2, 13, 0)."""
    return tuple(int(part) for part in re.match(r"\d*(?:\.\d+)*", text).group().split(".") if part)


def _dots(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
