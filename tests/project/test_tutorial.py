"""The tutorial, done in its order: its files are saved under their names and its commands run as they stand."""

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

from icegrt import cli

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorial.md"
# The quick run reduces sizes alone.
QUICK = {
    "sample": ["sample.limit=60"],
    "ppo": ["ppo.iterations=2", "ppo.prompts_per_iteration=16"],
}


def steps():
    """Yield (file name, text) for each file to save, and ("", line) for each command, in the page's order."""
    text = PAGE.read_text(encoding="utf-8")
    for language, title, body in re.findall(
        r'^```(\w+)(?: title="(.*?)")?\n(.*?)^```$', text, re.DOTALL | re.MULTILINE
    ):
        if language == "python":
            assert title, body
            yield title, body
        elif language == "sh":
            yield from (("", line) for line in body.replace("\\\n", " ").splitlines())


@pytest.mark.parametrize(
    "sizes",
    [pytest.param(QUICK, id="quick", marks=pytest.mark.slow), pytest.param({}, id="full", marks=pytest.mark.long)],
)
def test_the_tutorial_ends_with_an_exported_model(tmp_path, monkeypatch, capsys, sizes):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    output = ""
    for name, text in steps():
        if name:
            Path(name).write_text(text, encoding="utf-8")
            continue
        program, *words = shlex.split(text)
        capsys.readouterr()
        if program == "icegrt":
            assert cli.main([*words, *sizes.get(words[0], [])]) == 0, (text, capsys.readouterr().err)
        elif program == "python":
            runpy.run_path(words[0], run_name="__main__")
        else:
            assert text in ("make install", "source .venv/bin/activate"), text
        output = capsys.readouterr().out
    rows = [json.loads(line) for line in Path("runs/ppo/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    before, after = rows[0], rows[-1]["evaluation"]
    assert Path("runs/ppo/report.html").is_file() and Path("exported/model.safetensors").is_file()
    if sizes:
        assert after["function_score_mean"] is not None and output.strip()
    else:  # what the page promises
        assert 0.4 < before["function_score_mean"] < 0.7 and after["function_score_mean"] > 0.8
        assert output.strip() in {
            f"A {w}." for w in ("apple", "pear", "plum", "grape", "melon", "lemon", "fig", "kiwi")
        }
