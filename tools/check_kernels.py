"""Part of `make check`: an operation in the tree needs its reference, a test and a bench, and a kernel its proofs.

    python tools/check_kernels.py

Operations are those of kernels/dispatch.py; the folder (or file) under kernels/ that an implementation lies in gives
its name to tests/kernels/test_<folder>.py and bench/kernels/bench_<folder>.py, unless the operation has files of its
own name. A folder's triton.py must be reachable from the table, run under the interpreter by a file in
tests/kernels/triton, have mutants, and where it defines kernels, be compiled ahead of time by a file in
tests/kernels/aot; a cpp.py must be reachable and named by its operation's test.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

KINDS = (("test", "tests/kernels/test_{}.py"), ("bench", "bench/kernels/bench_{}.py"))


def missing(root: Path, implementations: dict[str, dict[str, str]]) -> list[str]:
    """What is missing, one line each."""
    found = []
    for op, backends in implementations.items():
        if "reference" not in backends:
            found.append(f"{op}: no reference in kernels/dispatch.py")
        folder = next(iter(backends.values())).split(":")[0].split(".")[0]
        for kind, pattern in KINDS:
            names = [pattern.format(name) for name in dict.fromkeys((op, folder))]
            files = [root / name for name in names if (root / name).exists()]
            if not files:
                found.append(f"{op}: no {kind}: expected {' or '.join(names)}")
            elif not any(op in file.read_text() for file in files):
                found.append(f"{op}: {files[0].relative_to(root)} does not mention it")
    ops = {place.split(":")[0]: op for op, table in implementations.items() for place in table.values()}
    for path in sorted([*root.glob("kernels/*/triton.py"), *root.glob("kernels/*/cpp.py")]):
        if path.parent.name != "common":
            found += _missing_proofs(root, path, ops)
    return found


def _missing_proofs(root: Path, path: Path, ops: dict[str, str]) -> list[str]:
    folder, place = path.parent.name, path.relative_to(root).as_posix()
    module = f"{folder}.{path.stem}"
    op = ops.get(module)
    if op is None:
        return [f"{place}: no operation in kernels/dispatch.py runs it"]
    if path.stem == "cpp":
        test = root / "tests" / "kernels" / f"test_{op}.py"
        return [] if test.exists() and '"cpp"' in test.read_text() else [f"{place}: no test names it"]
    proofs = {"triton": op}
    if "@triton.jit" in path.read_text():  # a module may only launch other modules' kernels, which are compiled there
        proofs["aot"] = module
    lines = [
        f"{place}: nothing in tests/kernels/{kind} mentions {word}"
        for kind, word in proofs.items()
        if not any(word in file.read_text() for file in root.glob(f"tests/kernels/{kind}/*.py"))
    ]
    if not any(f'"{module}"' in file.read_text() for file in root.glob("tests/kernels/mutants/*.py")):
        lines.append(f"{place}: no mutant in tests/kernels/mutants")
    return lines


def main() -> int:
    root = Path(__file__).resolve().parents[1]
    found = missing(root, importlib.import_module("icegrt.kernels.dispatch").IMPLEMENTATIONS)
    print(*found, sep="\n", file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
