"""Every listed mutant is noticed by its check, which passes on the kernel as it is."""

import pytest

from tests.kernels.mutants import mutants


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=str)
def test_is_noticed(mutant):
    check = mutants.check(mutant.check)
    check(**mutant.arguments)
    with mutants.broken(mutant), pytest.raises(AssertionError):
        check(**mutant.arguments)
