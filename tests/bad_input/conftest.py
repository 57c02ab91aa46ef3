"""Fixtures of the bad-input tests: a clean environment, the folder of a refused run, the check of a refusal."""

import pytest

from tests.helpers.refusals import check_refused


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """Remove torchrun's variables and icegrt's own; connect to this machine without a proxy."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "ICEGRT_DEBUG", "ICEGRT_QUIET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def run_dir(tmp_path):
    """The folder of a run that is refused: neither it nor its parent may be created."""
    return tmp_path / "new" / "run"


@pytest.fixture
def refused(capfd, tmp_path):
    """`refused(argv, *words)`: see `check_refused`; no file may be left in `tmp_path`."""

    def run(argv, *words):
        return check_refused(capfd, tmp_path, argv, *words)

    return run
