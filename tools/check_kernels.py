"""Part of `make check`: name what a kernel lacks of its reference, tests, bench, mutants and compiles.

    python tools/check_kernels.py

Operations are those of kernels/dispatch.py; each needs a reference. The folder (or file) under kernels/ that implements
an operation gives its name to the operation's files:

    tests/kernels/test_<folder>.py      or test_<operation>.py, if a folder holds several operations
    bench/kernels/bench_<folder>.py     or bench_<operation>.py

and, if the folder has a triton.py:

    tests/kernels/triton/test_<folder>.py   runs it under the interpreter
    tests/kernels/mutants/<folder>.py       lists changes that those tests must notice
    tests/kernels/aot/test_<folder>.py      compiles its kernels ahead of time, if it defines any

A triton.py or cpp.py must be reachable from the table, and an operation's test must name a cpp.py.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

OPERATION_FILES = (("test", "tests/kernels/test_{}.py"), ("bench", "bench/kernels/bench_{}.py"))
TRITON_FILES = (
    ("tests/kernels/triton/test_{}.py", "runs it under the interpreter"),
    ("tests/kernels/mutants/{}.py", "lists its mutants"),
)
COMPILE_FILE = ("tests/kernels/aot/test_{}.py", "compiles its kernels ahead of time")


def missing(root: Path, implementations: dict[str, dict[str, str]]) -> list[str]:
    """Return what the kernels under `root` lack, one line each.

    Args:
        root: The repository.
        implementations: operation -> backend -> "module:function" under kernels/, as in kernels/dispatch.py.
    """
    lines = []
    for op, backends in implementations.items():
        if "reference" not in backends:
            lines.append(f"{op}: no reference in kernels/dispatch.py")
        folder = next(iter(backends.values())).split(":")[0].split(".")[0]
        lines += _missing_operation_files(root, op, folder)
    ops = {target.split(":")[0]: op for op, backends in implementations.items() for target in backends.values()}
    for path in sorted([*root.glob("kernels/*/triton.py"), *root.glob("kernels/*/cpp.py")]):
        folder, backend = path.parent.name, path.relative_to(root).as_posix()
        op = ops.get(f"{folder}.{path.stem}")
        if folder == "common":
            continue
        if op is None:
            lines.append(f"{backend}: no operation in kernels/dispatch.py runs it")
        elif path.stem == "cpp":
            lines += _missing_cpp_test(root, backend, op, folder)
        else:
            lines += _missing_triton_files(root, path, folder)
    return lines


def _missing_operation_files(root: Path, op: str, folder: str) -> list[str]:
    lines = []
    for kind, pattern in OPERATION_FILES:
        names = [pattern.format(name) for name in dict.fromkeys((op, folder))]
        files = [root / name for name in names if (root / name).exists()]
        if not files:
            lines.append(f"{op}: no {kind}: create {' or '.join(names)}")
        elif not any(op in file.read_text() for file in files):
            lines.append(f"{op}: no {kind}: {files[0].relative_to(root)} does not mention it")
    return lines


def _missing_cpp_test(root: Path, backend: str, op: str, folder: str) -> list[str]:
    tests = [root / f"tests/kernels/test_{name}.py" for name in (op, folder)]
    if any(test.exists() and '"cpp"' in test.read_text() for test in tests):
        return []
    return [f'{backend}: tests/kernels/test_{op}.py does not run the backend "cpp"']


def _missing_triton_files(root: Path, path: Path, folder: str) -> list[str]:
    wanted = [*TRITON_FILES]
    if "@triton.jit" in path.read_text():  # a module may only launch other modules' kernels, which are compiled there
        wanted.append(COMPILE_FILE)
    backend = path.relative_to(root).as_posix()
    names = [(pattern.format(folder), purpose) for pattern, purpose in wanted]
    return [f"{backend}: create {name}, which {purpose}" for name, purpose in names if not (root / name).exists()]


def main() -> int:
    root = Path(__file__).resolve().parents[1]
    lines = missing(root, importlib.import_module("icegrt.kernels.dispatch").IMPLEMENTATIONS)
    print(*lines, sep="\n", file=sys.stderr)
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
