"""Warnings of the project's own code are errors in its tests, in forked ranks as well (pyproject.toml)."""

import warnings

import pytest

from tests.helpers.ranks import launch


def warn():
    warnings.warn("a warning of own code", stacklevel=1)


def test_a_warning_of_own_code_is_an_error():
    with pytest.raises(UserWarning, match="own code"):
        warn()


def test_a_warning_of_a_rank_fails_the_rank():
    with pytest.raises(AssertionError, match="UserWarning: a warning of own code"):
        launch(1, warn)
