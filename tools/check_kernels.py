"""Part of `make check`: an operation in the tree needs its reference, a test and a bench, and a kernel its proofs.

    python tools/check_kernels.py

Operations are those of kernels/dispatch.py. Files are found by name: tests/test_<file>.py and bench/bench_<file>.py for
the operation or for the file that defines it (whitening holds two). A Triton module (kernels/*_triton.py) must be
reachable from the table, run under the interpreter by a file in tests/interpreted, have mutants in tests/mutants.py,
and where it defines kernels, be compiled ahead of time by one in tests/compiled; a C++ one must be reachable and named
by its operation's test.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path


def lacks(root: Path, implementations: dict[str, dict[str, str]]) -> list[str]:
    """What is missing, one line each."""
    found = []
    for op, backends in implementations.items():
        home = _defining_file(root, op)
        if "reference" not in backends:
            found.append(f"{op}: no reference in kernels/dispatch.py")
        for what, folder, pattern in (("test", "tests", "test_{}.py"), ("bench", "bench", "bench_{}.py")):
            names = dict.fromkeys(pattern.format(name) for name in (op, home))
            files = [root / folder / name for name in names if (root / folder / name).exists()]
            if not files:
                found.append(f"{op}: no {what}: expected {folder}/{' or '.join(names)}")
            elif not any(op in file.read_text() for file in files):
                found.append(f"{op}: {files[0].relative_to(root)} does not mention it")
    modules = {place.split(":")[0]: op for op, table in implementations.items() for place in table.values()}
    for path in sorted(root.glob("kernels/*_triton.py")) + sorted(root.glob("kernels/*_cpp.py")):
        found += _module_lacks(root, path, modules)
    return found


def _module_lacks(root: Path, path: Path, modules: dict[str, str]) -> list[str]:
    name, op = path.stem, modules.get(path.stem)
    if op is None:
        return [f"kernels/{path.name}: no operation in kernels/dispatch.py runs it"]
    if name.endswith("_cpp"):
        test = root / "tests" / f"test_{op}.py"
        return [] if test.exists() and '"cpp"' in test.read_text() else [f"kernels/{path.name}: no test names it"]
    proofs = {"interpreted": op}
    if "@triton.jit" in path.read_text():  # a module may only launch other modules' kernels, which are compiled there
        proofs["compiled"] = name
    missing = [
        f"kernels/{path.name}: nothing in tests/{folder} mentions {word}"
        for folder, word in proofs.items()
        if not any(word in file.read_text() for file in root.glob(f"tests/{folder}/*.py"))
    ]
    if f'"{name}"' not in "".join(file.read_text() for file in root.glob("tests/mutants*.py")):
        missing.append(f"kernels/{path.name}: no mutant in tests/mutants.py")
    return missing


def _defining_file(root: Path, op: str) -> str:
    """The file under kernels/ whose public function is `op`, by the imports of kernels/__init__.py."""
    for node in ast.walk(ast.parse((root / "kernels" / "__init__.py").read_text())):
        if isinstance(node, ast.ImportFrom) and any(alias.name == op for alias in node.names):
            return node.module
    return op


def main() -> int:
    root = Path(__file__).resolve().parents[1]
    found = lacks(root, importlib.import_module("icegrt.kernels.dispatch").IMPLEMENTATIONS)
    print(*found, sep="\n", file=sys.stderr)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
