"""`icegrt doctor`: check the machine, the packages and the engine, and advise on each problem.

A check never raises: it reports a broken package as a failure. This module imports the standard library only, so that
it runs without any package.
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
from icegrt.utils.text import first_line

OK, NOTE, FAIL = "ok", "note", "FAIL"  # a note costs speed or a feature; a failure stops the engine
_GIB = 2**30
_ENGINE = "pip install 'icegrt[engine]'"


@dataclasses.dataclass(frozen=True)
class Check:
    """The result of one check: its name, what was found, OK, NOTE or FAIL, and the advice."""

    name: str
    found: str
    status: str = OK
    advice: str = ""


@dataclasses.dataclass(frozen=True)
class Package:
    """A dependency and its tested versions: from `low` up to, not including, `below`.

    `without`: the effect of its absence, if it is not `required`.
    """

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
    """Print all checks. Return 0 if the engine can run here and 1 if not."""
    with contextlib.redirect_stdout(sys.stderr):  # keep the output of libraries out of the report
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
    """Return all checks, in the order of the report."""
    checks = [python(), system(), processors(), memory()]
    checks += [package(p) for p in PACKAGES]
    checks += run_check("bf16 on the CPU", bf16_on_cpu, "reinstall torch")
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
        return [Check(name, f"not checked: {first_line(error)}", NOTE, "see the packages above")]
    except Exception as error:  # a broken installation raises many types
        return [Check(name, first_line(error), FAIL, advice)]


def python() -> Check:
    """Check the version of the interpreter."""
    supported = sys.version_info >= (3, 10)
    advice = "" if supported else "use Python 3.10 or newer"
    return Check("Python", platform.python_version(), OK if supported else FAIL, advice)


def system() -> Check:
    """Check the operating system; only Linux is tested."""
    is_linux = sys.platform.startswith("linux")
    return Check("platform", platform.platform(), OK if is_linux else NOTE, "" if is_linux else "only Linux is tested")


def processors() -> Check:
    """Count the cores that this process may use; a container can restrict them."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Check("CPU", f"{usable} cores usable of {os.cpu_count()}")


def bf16_on_cpu() -> Iterable[Check]:
    """Compare a matrix product in bf16 with one in fp32 on the CPU."""
    from icegrt.utils.cpu import bf16_slowdown

    slowdown = bf16_slowdown()
    found = f"a matrix product takes {slowdown:.2g} times as long as in fp32"
    is_slower = slowdown > 1
    yield Check("bf16 on the CPU", found, NOTE if is_slower else OK, "run.dtype=fp32 is faster" if is_slower else "")


def memory() -> Check:
    """Check the main memory of the machine."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return Check("memory", "unknown", NOTE)
    is_small = total < 4 * _GIB
    advice = "only tiny models will fit" if is_small else ""
    return Check("memory", f"{total / _GIB:.1f} GiB", NOTE if is_small else OK, advice)


def package(required: Package) -> Check:
    """Check that a package is installed in a supported version."""
    problem = FAIL if required.required else NOTE
    try:
        installed = metadata.version(required.name)
    except metadata.PackageNotFoundError:
        effect = f": {required.without}" if required.without else ""
        return Check(required.name, f"not installed{effect}", problem, required.advice)
    version = _version(installed)
    if (required.low and version < required.low) or (required.below and version >= required.below):
        supported = f">= {_dots(required.low)}" + (f", < {_dots(required.below)}" if required.below else "")
        advice = f"supported: {supported}" + (f"; {required.advice}" if required.advice else "")
        return Check(required.name, installed, problem, advice)
    return Check(required.name, installed)


def devices() -> Iterable[Check]:
    """Yield a check per CUDA device: name, compute capability and memory."""
    import torch

    if not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device is visible"
        yield Check("GPU", f"none: {reason}", NOTE, "the same code runs on CPU, for small models")
        return
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        is_old = (p.major, p.minor) < (8, 0)
        text = f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / _GIB:.0f} GiB, CUDA {torch.version.cuda}"
        advice = "kernels are compiled and tested from sm_80" if is_old else ""
        yield Check(f"GPU {i}", text, NOTE if is_old else OK, advice)


def distributed() -> Iterable[Check]:
    """Check the backends of torch.distributed: every run needs gloo, a run on GPUs needs NCCL."""
    import torch
    import torch.distributed as dist

    available = dist.is_available()
    has = {"gloo": available and dist.is_gloo_available(), "nccl": available and dist.is_nccl_available()}
    backends = ", ".join(f"{name} {'yes' if built else 'no'}" for name, built in has.items())
    if not has["gloo"]:
        yield Check("distributed", backends, FAIL, "install a torch with gloo: every run joins a gloo group")
    elif torch.cuda.is_available() and not has["nccl"]:
        yield Check("distributed", backends, FAIL, "install a torch with NCCL to use the GPU")
    else:
        yield Check("distributed", backends)


def extension() -> Check:
    """Check that the compiled extension loads."""
    advice = "make install (needs a C++17 compiler and CMake)"
    try:
        importlib.import_module("icegrt._C")
    except ModuleNotFoundError:
        return Check("icegrt._C", "not built", FAIL, advice)
    except ImportError as error:
        return Check("icegrt._C", f"does not load: {first_line(error)}", FAIL, f"build it again: {advice}")
    return Check("icegrt._C", "built")


def kernels() -> Iterable[Check]:
    """Yield a line per backend with the kernels that use it here."""
    import torch

    dispatch = importlib.import_module("icegrt.kernels.dispatch")
    backend_of: Mapping[str, str] = dispatch.describe("cuda" if torch.cuda.is_available() else "cpu")
    by_backend: dict[str, list[str]] = {}
    for name, backend in backend_of.items():
        by_backend.setdefault(backend, []).append(name)
    for backend, names in by_backend.items():
        yield Check(f"kernels: {backend}", ", ".join(names))


def disk() -> Check:
    """Check the free space of the current folder, the default place of runs."""
    free = shutil.disk_usage(".").free
    is_small = free < 5 * _GIB
    advice = "little room for checkpoints: free some, or set run.dir to another disk" if is_small else ""
    return Check("disk here", f"{free / _GIB:.1f} GiB free", NOTE if is_small else OK, advice)


def forward_pass() -> Check:
    """Run a forward pass of a two-layer model through Megatron, to test that the parts work together."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = importlib.import_module("icegrt.model.selftest").run()
    except ModuleNotFoundError as error:
        return Check("forward pass", f"needs {error.name}, which is not installed", FAIL, "see the packages above")
    except Exception as error:  # a broken installation raises many types
        text = f"{type(error).__name__}: {first_line(error)}"
        return Check("forward pass", text, FAIL, "fix the failures above; if there are none, report this")
    return Check("forward pass", f"{result} ({time.perf_counter() - start:.1f} s)")


def _version(text: str) -> tuple[int, ...]:
    """Return the release numbers: (2, 13, 0) for 2.13.0+cpu."""
    return tuple(int(part) for part in re.match(r"\d*(?:\.\d+)*", text).group().split(".") if part)


def _dots(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
