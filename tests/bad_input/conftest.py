"""Fixtures of the corpus of bad input."""

import pytest
import stage_cases as cases
from bad_input import corpus


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Checkpoints and files that are all right, to be damaged in a copy."""
    return cases.make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One process that nobody launched."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "ICEGRT_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def refused(capsys, tmp_path):
    """`refused(argv, *needles)`: see `corpus.refused`; nothing may be left in `tmp_path`."""

    def run(argv, *needles):
        return corpus.refused(capsys, tmp_path, argv, *needles)

    return run
