"""What the corpus of bad inputs shares: a home with good inputs, and a check of how a command refuses."""

import pytest
import stage_cases as cases

from icegrt import cli


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return cases.make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "ICEGRT_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "new" / "run"


@pytest.fixture
def refused(capfd, tmp_path):
    """Runs a command line that must be refused: status 2, one error of a few lines with all `words`, no traceback, and
    no file in tmp_path that was not there."""

    def run(command, *words):
        before = cases.files_under(tmp_path)
        capfd.readouterr()
        assert cli.main(list(command)) == 2
        lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("warning:")]
        text = "\n".join(lines)
        assert text.startswith("error: ") and text.count("error: ") == 1 and "Traceback" not in text, text
        assert len(lines) <= 6 and len(text) < 1500, text
        for word in words:
            assert str(word) in text, f"expected {word!r} in: {text}"
        assert cases.files_under(tmp_path) == before
        return text

    return run
