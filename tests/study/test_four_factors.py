"""The studies of the repository: their files are complete, and within the time and the settings that they may have."""

import types
from pathlib import Path

import pytest

from icegrt.config import StudyConfig
from icegrt.study.checks import check
from icegrt.study.grid import grid, input_files
from studies.four_factors.exactness import exactness

ROOT = Path(__file__).resolve().parents[2]
FILES = [path for path in sorted((ROOT / "studies").glob("*/*.yaml")) if path.name != "recipe.yaml"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_study_can_run_from_the_root_of_the_repository(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = StudyConfig.load(path)
    check(config)
    files = input_files(config)
    assert {"studies/four_factors/prepare.py", "studies/four_factors/recipe.yaml"} <= set(files)
    assert len(grid(config, files)) == 5 * len(config.settings) and config.time_limit_seconds <= 90


def test_the_four_factors_have_twelve_settings(monkeypatch):
    monkeypatch.chdir(ROOT)
    configs = [StudyConfig.load(path) for path in FILES]
    assert len(configs) == 4 and sum(len(config.settings) for config in configs) == 12
    assert len({config.dir for config in configs}) == len({config.page for config in configs}) == 4


def test_exactness_counts_digits_in_their_place():
    samples = [("1234", "stop"), ("1243", "stop"), ("1234", "length"), ("12345", "stop"), ("", "stop")]
    row = {"answer": "1234"}
    assert exactness([types.SimpleNamespace(text=t, finish_reason=f, row=row) for t, f in samples]) == [1, 0.5, 0, 0, 0]
