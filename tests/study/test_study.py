"""A whole study over a fake run: what is frozen when, what the page has, and how it continues after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from icegrt import cli
from icegrt.config import StudyContrast, StudyMeasure
from icegrt.config.loader import as_yaml
from icegrt.errors import ConfigError, RunError
from icegrt.study.page import value_text
from icegrt.study.plots import band_of
from icegrt.study.results import ContrastResult
from icegrt.study.runner import lock_study
from icegrt.study.statistics import PairedDifference, detectable_difference
from icegrt.study.study import run_study
from icegrt.study.verdicts import OUTCOMES, outcome_of, sentence
from tests.helpers.studies import STUDY, starts, study_of


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study that has run, with its outcome."""
    folder = tmp_path_factory.mktemp("study")
    return folder, run_study(study_of(folder))


def test_the_pilot_runs_first_and_every_run_once(finished):
    folder, outcome = finished
    assert outcome.complete and outcome.results.finished == outcome.results.runs == 12
    runs = starts(folder)
    assert sorted(runs[:3]) == ["plain 100", "plain 101", "plain 102"]
    assert sorted(runs[3:]) == sorted(f"{s['name']} {seed}" for s in STUDY["settings"] for seed in STUDY["seeds"])


def test_outcomes_are_those_of_the_numbers(finished):
    _, outcome = finished
    gain, wrong, none, alike = outcome.results.contrasts
    assert [c.outcome for c in (gain, wrong, none, alike)] == ["as expected", "opposite", "not shown", "equal"]
    # Evaluations 3 and 4 of 0 to 4: the means are 0.875 gain.
    assert gain.difference.low < 0.875 < gain.difference.high and gain.seeds == [0, 1, 2, 3]
    assert none.difference == alike.difference
    assert gain.holm_p == pytest.approx(4 * gain.difference.p_value)


def test_the_page_has_contrasts_power_settings_and_what_was_frozen(finished):
    folder, outcome = finished
    markdown = (folder / "study" / "study.md").read_text(encoding="utf-8")
    page = outcome.page.read_text(encoding="utf-8")
    document = json.loads((folder / "study" / "study.json").read_text(encoding="utf-8"))
    for text in (markdown, page):
        assert "2 of 4 expectations were confirmed, 1 failed, 1 without a measurable difference." in text
        assert "The expectation failed: more has a higher score (points) than plain, not a lower one: +0." in text
        assert "There are 4 contrasts. Each interval holds for its contrast alone, it is not simultaneous" in text
        assert "score: mean of the last 2 values of evaluation.score in metrics.jsonl, of iteration 3, 4" in text
        assert "12 of 12 runs finished." in text and "The study was not amended." in text
        assert "gain=2" in text and f"python {sys.version.split()[0]}" in text
        assert all(c in text for c in document["sentences"].values())
    assert "+0.8" in markdown and "![score: curves, runs and contrasts](score.png)" in markdown
    assert "data:image/png;base64," in page and "<script" not in page
    assert document["frozen"]["sha256"] in page and document["frozen"]["study"]["contrasts"][0]["name"] == "gain"
    assert len(document["results"]["curves"]["score"]["plain"]) == 4


def test_the_statement_of_power_is_that_of_the_pilot_and_older_than_the_runs(finished):
    folder, _ = finished
    power = json.loads((folder / "study" / "power.json").read_text(encoding="utf-8"))["power"][0]
    values = list(power["values"].values())
    mean = sum(values) / 3
    std = (sum((value - mean) ** 2 for value in values) / 2) ** 0.5
    assert power["std"] == pytest.approx(std)
    assert power["difference"] == pytest.approx(2**0.5 * detectable_difference(std, 4))
    written = os.stat(folder / "study" / "power.json").st_mtime_ns
    runs = (folder / "study" / "runs").glob("*/*/started.json")
    assert written < min(os.stat(path).st_mtime_ns for path in runs)


def test_a_second_start_runs_nothing_and_gives_the_same_results(finished):
    folder, outcome = finished
    before = starts(folder)
    again = run_study(study_of(folder))
    assert starts(folder) == before and again.results == outcome.results


def test_the_page_can_be_written_while_the_study_goes_on(finished):
    folder, outcome = finished
    with lock_study(folder / "study"):
        assert run_study(study_of(folder, report_only=True)).results == outcome.results


def test_the_page_says_what_a_measure_is():
    final = StudyMeasure(name="score", field="evaluation.score")
    ended, cut = [(float(x), 0.5) for x in (4, 8, 12)], [(4.0, 0.5), (8.0, 0.5)]
    text = "last value of evaluation.score in metrics.jsonl"
    assert value_text(final, {}) == text
    whole = value_text(final, {"a": [ended, [(4.0, 2.0), *ended[1:]]], "b": [ended]})
    assert whole == f"{text}, of iteration 12; at iteration 4 the mean of all runs is 1.000"
    assert value_text(final, {"a": [ended, ended[1:]]}) == f"{text}, of iteration 12"
    assert value_text(final, {"a": [ended], "b": [cut]}) == f"{text}, whose iterations differ between runs"
    assert value_text(StudyMeasure(name="peak", file="memory.json", field="peak"), None) == "peak in memory.json"


def test_a_changed_study_is_refused_and_an_amended_one_lists_the_change(tmp_path):
    run_study(study_of(tmp_path, seeds=[0, 1], pilot={}))
    late = [*STUDY["contrasts"], {"name": "new", "a": "more", "b": "same"}]
    late[1] = late[1] | {"expected": "higher"}
    changes = {"seeds": [0, 1], "pilot": {}, "contrasts": late, "title": "Another"}
    with pytest.raises(ConfigError) as error:
        run_study(study_of(tmp_path, **changes))
    assert 'study.contrasts[wrong].expected was "lower", now is "higher"' in str(error.value)
    assert "--amend" in str(error.value)
    outcome = run_study(study_of(tmp_path, **changes, amend=True))
    text = (tmp_path / "study" / "study.md").read_text(encoding="utf-8")
    assert "after 6 runs had finished:" in text and "study.contrasts[wrong].expected was" in text
    assert [c.late for c in outcome.results.contrasts] == [None, 6, None, None, 6]
    assert "The contrast was written down or changed after 6 runs had finished." in text
    assert len(starts(tmp_path)) == 6
    assert run_study(study_of(tmp_path, **changes)).complete  # the amended study is the frozen one now


def test_a_changed_setting_or_script_runs_its_runs_again(tmp_path):
    changes = {"seeds": [0, 1], "pilot": {}}
    run_study(study_of(tmp_path, **changes))
    settings = [*STUDY["settings"][:2], {"name": "same", "overrides": ["noise=d", "name=same"]}]
    run_study(study_of(tmp_path, **changes, settings=settings, amend=True))
    assert starts(tmp_path)[6:] == ["same 0", "same 1"]
    with open(tmp_path / "script.py", "a", encoding="utf-8") as file:
        file.write("# other\n")
    with pytest.raises(ConfigError, match=r"script.py has other contents"):
        run_study(study_of(tmp_path, **changes, settings=settings))


def test_keys_that_change_no_result_are_free(finished):
    folder, _ = finished
    page = folder / "docs" / "gain.md"
    run_study(study_of(folder, parallel=1, page=str(page), stop_after="pilot"))
    assert "](gain_score.png)" in page.read_text(encoding="utf-8") and (folder / "docs" / "gain_score.png").exists()


def test_a_failed_run_is_shown_and_does_not_end_the_study(tmp_path, capsys):
    settings = [STUDY["settings"][0], STUDY["settings"][1] | {"overrides": ["fails=1", "name=more", "noise=b"]}]
    contrasts = [{"name": "gain", "a": "more", "b": "plain", "expected": "equal", "margin": 1.0}]
    config = study_of(tmp_path, settings=settings, contrasts=contrasts, pilot={})
    path = tmp_path / "study.yaml"
    path.write_text(as_yaml(config), encoding="utf-8")
    assert cli.main(["study", str(path)]) == 1
    output = capsys.readouterr()
    assert "1 of 8 runs failed; --retry-failed runs them again" in output.err
    expected = "As expected, more and plain differ in score (points) by less than 1.000"
    assert expected in output.out and "3 seeds" in output.out
    text = (tmp_path / "study" / "study.md").read_text(encoding="utf-8")
    assert "7 of 8 runs finished, 1 failed" in text
    assert "* more, seed 1: it ended with exit status 1." in text
    assert "no more memory" in (tmp_path / "study" / "study.html").read_text(encoding="utf-8")


def test_a_failed_pilot_ends_the_study(tmp_path, capsys):
    base = {"command": f"python -S {tmp_path / 'broken.py'} {{out}} {{seed}}"}
    (tmp_path / "broken.py").write_text("raise SystemExit('broken')")
    outcome = run_study(study_of(tmp_path, base=base))
    assert not outcome.complete and not (tmp_path / "study" / "runs").exists()
    assert "the pilot has failed" in capsys.readouterr().err


def test_prepare_runs_once_for_each_seed_and_its_failure_ends_the_study(tmp_path):
    (tmp_path / "prepare.py").write_text("import sys; open(sys.argv[1] + '/model', 'w').write(sys.argv[2])")
    study_of(tmp_path)  # writes the script
    command = f"python -S {tmp_path / 'script.py'} out={{out}} seed={{seed}} log={tmp_path} wait_for={{shared}}/model"
    prepare = f"python -S {tmp_path / 'prepare.py'} {{shared}} {{seed}}"
    config = {"base": {"command": command, "prepare": prepare}, "seeds": [0, 1], "pilot": {}}
    assert run_study(study_of(tmp_path, **config)).complete
    assert [(tmp_path / f"study/shared/seed_{n}/run/model").read_text() for n in (0, 1)] == ["0", "1"]
    config["base"]["prepare"] += " 3; no"
    (tmp_path / "prepare.py").write_text("raise SystemExit(3)")
    with pytest.raises(RunError, match=r"prepare, seed 0 failed: it ended with exit status 3; see .*log.txt"):
        run_study(study_of(tmp_path, **config, amend=True))


def has_ended(pid, seconds=30.0):
    """Return whether a process ends in time. Its entry may stay: init has not collected it yet."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.05)
    return False


def test_a_killed_study_continues_without_repeating_finished_runs(tmp_path):
    # The first run of seed 1 kills the study, once, with the signal that nothing can catch.
    study_of(tmp_path)
    script = (tmp_path / "script.py").read_text()
    killer = """
if words['seed'] == '1' and not os.path.exists(words['log'] + '/killed'):
    open(words['log'] + '/killed', 'w').write(str(os.getpid()))
    os.kill(os.getppid(), 9)
    time.sleep(600)
"""
    (tmp_path / "script.py").write_text(script + killer, encoding="utf-8")
    config = study_of(tmp_path, pilot={}, parallel=1)
    path = tmp_path / "study.yaml"
    path.write_text(as_yaml(config), encoding="utf-8")
    command = [sys.executable, "-m", "icegrt", "study", str(path)]
    killed = subprocess.run(command, capture_output=True, timeout=280)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert starts(tmp_path) == ["plain 0", "more 0", "same 0", "plain 1"]
    outcome = run_study(config)  # waits for the lock, which the run that was left over holds until its SIGTERM
    assert outcome.complete
    assert has_ended(int((tmp_path / "killed").read_text()))
    assert starts(tmp_path)[4:] == [f"{s['name']} {seed}" for seed in (1, 2, 3) for s in STUDY["settings"]]


def test_ctrl_c_writes_the_page_and_names_the_way_on(tmp_path, capsys):
    study_of(tmp_path)
    script = (tmp_path / "script.py").read_text()
    (tmp_path / "script.py").write_text(script + "if words['seed'] == '2': os.kill(os.getppid(), 2); time.sleep(600)\n")
    path = tmp_path / "study.yaml"
    path.write_text(as_yaml(study_of(tmp_path, pilot={}, parallel=1)), encoding="utf-8")
    assert cli.main(["study", str(path)]) == 130
    assert "the same command continues the study" in capsys.readouterr().err
    text = (tmp_path / "study" / "study.md").read_text(encoding="utf-8")
    assert "6 of 12 runs finished, 6 have not ended: the figures are preliminary." in text


def difference(low, high, seeds=5):
    return PairedDifference(seeds, (low + high) / 2, 1.0, low, high, 0.01)


@pytest.mark.parametrize(
    ("expected", "low", "high", "outcome"),
    [
        ("higher", 0.1, 0.3, "as expected"),
        ("higher", -0.1, 0.3, "not shown"),
        ("higher", 0.0, 0.3, "not shown"),
        ("higher", -0.3, -0.1, "opposite"),
        ("lower", -0.3, -0.1, "as expected"),
        ("lower", 0.1, 0.3, "opposite"),
        ("equal", -0.1, 0.15, "equal"),
        ("equal", 0.1, 0.3, "undecided"),
        ("equal", -0.2, 0.1, "undecided"),
        ("equal", 0.25, 0.3, "not equal"),
        ("equal", -0.3, -0.25, "not equal"),
    ],
)
def test_the_interval_decides_the_outcome(expected, low, high, outcome):
    contrast = StudyContrast(name="c", a="a", b="b", expected=expected, margin=0.2 if expected == "equal" else 0)
    assert outcome_of(contrast, difference(low, high)) == outcome
    result = ContrastResult(contrast, "score", [0, 1, 2, 3, 4], difference(low, high), 0.2, outcome, None, "nats")
    text = sentence(result, 7)
    assert text.startswith(OUTCOMES[outcome].split("{")[0]) and "{" not in text and "score (nats)" in text
    notes = "It does not hold after Holm's correction for 7 contrasts." in text
    assert notes == (outcome in ("as expected", "opposite"))


def test_without_two_seeds_nothing_is_claimed():
    contrast = StudyContrast(name="c", a="a", b="b")
    assert outcome_of(contrast, None) == "not measured"
    for seeds, words in (([], "no seed has finished runs of both a and b"), ([3], "one seed has finished runs")):
        result = ContrastResult(contrast, "score", seeds, None, None, "not measured", None)
        assert words in sentence(result, 0)


def test_a_band_has_the_points_that_every_seed_has():
    curves = [[(0.0, 1.0), (1.0, 2.0), (2.0, 9.0)], [(0.0, 3.0), (1.0, 5.0)]]
    assert band_of(curves) == ([0.0, 1.0], [2.0, 3.5], [1.0, 2.0], [3.0, 5.0])
