"""Every mutant is noticed by its check, which passes on the kernel as it is."""

import importlib

import pytest

from tests.kernels.mutants.mutation import ROOT, mutated_module

# One list an operation: a folder of kernels/ with a triton.py has a file of its name here.
OPERATIONS = sorted(path.parent.name for path in ROOT.glob("kernels/*/triton.py") if path.parent.name != "common")
MUTANTS = [mutant for op in OPERATIONS for mutant in importlib.import_module(f"tests.kernels.mutants.{op}").MUTANTS]


_passed: set[str] = set()


def check_unchanged(mutant):
    """Run a mutant's check on the kernel as it is, once for all mutants that name it with these arguments."""
    key = f"{mutant.check.__module__}.{mutant.check.__qualname__} {sorted(mutant.arguments.items())!r}"
    if key not in _passed:
        mutant.check(**mutant.arguments)
        _passed.add(key)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_is_noticed(mutant):
    check_unchanged(mutant)
    with mutated_module(mutant), pytest.raises(AssertionError):
        mutant.check(**mutant.arguments)
