"""Mutants: small changes to a kernel, each with the check that must notice it.

A test suite that a broken kernel passes proves nothing. `mutated_module(mutant)` replaces one expression or statement
of a kernel, writes the module to a file and loads it in the module's place. The mutant's check must then raise
AssertionError. Any other error means that the mutant does not run, which proves nothing either. test_mutants.py runs
the mutants of every operation.

To add one: append a Mutant to MUTANTS in tests/kernels/mutants/<operation>.py. Its check calls the public functions,
takes no fixtures and is small, because each mutant runs it once.
"""

import ast
import contextlib
import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from icegrt.kernels import dispatch
from icegrt.kernels.common.operators import OPERATORS

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = "icegrt.kernels"


@dataclass(frozen=True)
class Mutant:
    """One change to a kernel.

    `old` and `new` are Python source: an expression each, or one or more consecutive statements each. `old` matches
    syntax trees in the body of `function`, so layout and comments do not matter. It must match exactly once.

    Args:
        module: Path of the module under kernels/, with dots: "value_loss.triton".
        function: Name of the module's function to change.
        broken: What the change breaks.
        old: The pattern.
        new: Its replacement; `pass` removes a statement.
        check: The function that must raise AssertionError under the mutant.
        arguments: Keyword arguments of `check`.
        kernel: Name of the kernel that is launched, if it is not that of `function`.
    """

    module: str
    function: str
    broken: str
    old: str
    new: str
    check: Callable[..., None]
    arguments: dict = field(default_factory=dict)
    kernel: str | None = None

    @property
    def path(self) -> str:
        return f"kernels/{self.module.replace('.', '/')}.py"

    def __str__(self) -> str:
        return f"{self.kernel or self.function}: {self.broken}"


def mutated_source(source: str, mutant: Mutant) -> str:
    """Return the module's source with the mutant's pattern replaced.

    Raises:
        LookupError: If the function does not exist or the pattern does not match exactly once.
    """
    tree = ast.parse(source)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == mutant.function]
    if len(functions) != 1:
        raise LookupError(
            f"mutant {str(mutant)!r}: {mutant.path} must define function {mutant.function!r} once, "
            f"found {len(functions)} definitions"
        )
    old, new = ast.parse(mutant.old).body, ast.parse(mutant.new).body
    if _is_expression(old) and _is_expression(new):
        matches = _replace_expression(functions[0], old[0].value, new[0].value)
    else:
        matches = _replace_statements(functions[0], old, new)
    if matches != 1:
        raise LookupError(
            f"mutant {str(mutant)!r}: in {mutant.path}, function {mutant.function!r}, the pattern "
            f"{mutant.old!r} must match exactly once, got {matches} matches"
        )
    return ast.unparse(tree) + "\n"


def _is_expression(statements: list[ast.stmt]) -> bool:
    return len(statements) == 1 and isinstance(statements[0], ast.Expr)


class _ExpressionReplacer(ast.NodeTransformer):
    def __init__(self, old: ast.expr, new: ast.expr):
        self.old_dump, self.new, self.matches = ast.dump(old), new, 0

    def visit(self, node: ast.AST) -> ast.AST:
        if ast.dump(node) == self.old_dump:
            self.matches += 1
            return self.new
        return self.generic_visit(node)


def _replace_expression(function: ast.FunctionDef, old: ast.expr, new: ast.expr) -> int:
    """Replace every match in the function's body. Return the number of matches."""
    replacer = _ExpressionReplacer(old, new)
    function.body = [replacer.visit(statement) for statement in function.body]
    return replacer.matches


def _replace_statements(function: ast.FunctionDef, old: list[ast.stmt], new: list[ast.stmt]) -> int:
    """Replace every run of consecutive statements that matches. Return the number of matches."""
    old_dumps = [ast.dump(statement) for statement in old]
    fields = [getattr(node, name, None) for node in ast.walk(function) for name in ("body", "orelse", "finalbody")]
    matches = 0
    for block in fields:
        if not isinstance(block, list):  # the body of a lambda is an expression
            continue
        dumps = [ast.dump(statement) for statement in block]
        for start in reversed(range(len(block))):
            if dumps[start : start + len(old)] == old_dumps:
                block[start : start + len(old)] = new
                matches += 1
    return matches


@contextlib.contextmanager
def mutated_module(mutant: Mutant) -> Iterator[None]:
    """Load the mutated module in the kernel's place. Every other Triton module is imported anew around it."""
    source = mutated_source((ROOT / mutant.path).read_text(), mutant)
    with tempfile.TemporaryDirectory() as folder:
        # Triton reads a kernel's source from its file, so the mutated module needs one.
        path = Path(folder) / f"{mutant.module}.py"
        path.write_text(source)
        original_modules, original_operators = _forget_triton_modules(), dict(OPERATORS)
        try:
            name = f"{PACKAGE}.{mutant.module}"
            spec = importlib.util.spec_from_file_location(name, path)
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
            yield
        finally:
            _forget_triton_modules()
            sys.modules.update(original_modules)
            OPERATORS.update(original_operators)


def _forget_triton_modules() -> dict[str, ModuleType]:
    # Private: dispatch remembers the functions that it has loaded, and no public function makes it load them again.
    dispatch._load.cache_clear()
    names = [name for name in sys.modules if name.startswith(f"{PACKAGE}.") and ".triton" in name]
    return {name: sys.modules.pop(name) for name in names}
