"""What the corpus of bad input shares: a home with good inputs, and a check of how a command refuses."""

import pytest

from tests.helpers import corpus
from tests.helpers import stage_cases as cases


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Checkpoints and files that are all right, to be damaged in a copy."""
    return cases.make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One process that nobody launched, and no proxy on the way to itself."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "ICEGRT_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "new" / "run"


@pytest.fixture
def refused(capfd, tmp_path):
    """`refused(argv, *needles)`: see `corpus.refused`; nothing may be left in `tmp_path`."""

    def run(argv, *needles):
        return corpus.refused(capfd, tmp_path, argv, *needles)

    return run
