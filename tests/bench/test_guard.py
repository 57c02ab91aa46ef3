"""The guard: what counts as worse, and what its status is."""

import argparse

import pytest

from bench import guard
from bench.guard import BETTER, MISSING, NEW, OK, WORSE, compare
from tests.helpers.bench_rows import row, write


def rows(ours, other, *, spread=0.02, case="A8"):
    return [row("ours", ours, case=case, spread=spread), row("eager", other, case=case, spread=spread)]


def verdicts(committed, now, tolerance=0.15):
    return {finding.key: finding.verdict for finding in compare(committed, now, tolerance)}


@pytest.mark.parametrize(
    ("ours_now", "spread", "verdict"),
    [
        (10.0, 0.02, OK),
        (11.5, 0.02, OK),  # 13% worse
        (12.0, 0.02, WORSE),  # 17% worse, intervals apart
        (12.0, 0.2, OK),  # the same, but within the spread of the runs
        (8.0, 0.02, BETTER),
    ],
)
def test_worse_is_beyond_the_tolerance_and_outside_the_interval(ours_now, spread, verdict):
    committed, now = rows(10.0, 20.0, spread=spread), rows(ours_now, 20.0, spread=spread)
    assert verdicts(committed, now) == {("A8", "time", "eager"): verdict}


def test_a_slower_machine_is_not_worse():
    assert set(verdicts(rows(10.0, 20.0), rows(30.0, 60.0)).values()) == {OK}


def test_throughput_is_worse_when_it_falls():
    def speed(ours):
        return [row(name, v, metric="throughput", unit="tokens/s") for name, v in (("icegrt", ours), ("other", 100.0))]

    assert set(verdicts(speed(300.0), speed(200.0)).values()) == {WORSE}
    assert set(verdicts(speed(200.0), speed(300.0)).values()) == {BETTER}


def test_new_and_missing_alternatives_are_listed_and_cases_that_did_not_run_are_not():
    committed = [*rows(10.0, 20.0), row("compile", 12.0), *rows(1.0, 2.0, case="A9")]
    now = [*rows(10.0, 20.0), row("liger-kernel", 30.0)]
    assert verdicts(committed, now) == {
        ("A8", "time", "eager"): OK,
        ("A8", "time", "liger-kernel"): NEW,
        ("A8", "time", "compile"): MISSING,
    }


@pytest.mark.parametrize(
    ("now", "status", "text"),
    [
        (rows(10.0, 20.0), 0, "no quotient is worse"),
        (rows(13.0, 20.0), 1, "gae: A8, time, eager is worse than committed"),
        ([*rows(10.0, 20.0), *rows(99.0, 20.0, case="new case")], 0, "new"),
        ([row("ours", 10.0), row("another", 20.0)], 1, "gae: no case and alternative of this run is in the committed"),
    ],
)
def test_the_status_and_the_table_of_rows_that_are_there(tmp_path, capsys, now, status, text):
    write(tmp_path / "results" / "cpu", gae=rows(10.0, 20.0))
    write(tmp_path / "now" / "cpu", gae=now)
    arguments = ["--results", str(tmp_path / "results"), "--rows", str(tmp_path / "now" / "cpu")]
    assert guard.main(arguments) == status
    assert text in capsys.readouterr().out


def test_a_tolerance_of_ones_own(tmp_path):
    write(tmp_path / "results" / "cpu", gae=rows(10.0, 20.0))
    write(tmp_path / "now" / "cpu", gae=rows(13.0, 20.0))
    arguments = ["--results", str(tmp_path / "results"), "--rows", str(tmp_path / "now" / "cpu")]
    assert guard.main([*arguments, "--tolerance", "0.3"]) == 0


def test_a_folder_without_rows_fails(tmp_path, capsys):
    (tmp_path / "now" / "cpu").mkdir(parents=True)
    assert guard.main(["--results", str(tmp_path), "--rows", str(tmp_path / "now" / "cpu")]) == 1
    assert "has no rows" in capsys.readouterr().out


# -- runs of benches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runs", "verdict", "count"), [((13.0, 10.0), OK, 2), ((13.0, 13.0), WORSE, 2), ((10.0, 13.0), OK, 1)]
)
def test_a_worse_bench_runs_again_and_fails_only_if_it_is_worse_both_times(monkeypatch, runs, verdict, count):
    asked = []

    def measure(name, options, threads):
        asked.append((name, threads))
        return {"gae": rows(runs[len(asked) - 1], 20.0)}

    monkeypatch.setattr(guard, "measure", measure)
    options = argparse.Namespace(benches=["gae"], tolerance=0.15)
    findings, failures = guard.run(options, {"gae": rows(10.0, 20.0)})
    assert [finding.verdict for finding in findings["gae"]] == [verdict] and failures == []
    assert asked == [("gae", "2")] * count  # with the threads of the committed rows


def test_a_bench_that_fails_is_a_failure_and_the_others_go_on(monkeypatch):
    def measure(name, options, threads):
        if name == "broken":
            raise RuntimeError("broken: ended with status 3 and 0 files of rows")
        return {"gae": rows(10.0, 20.0)}

    monkeypatch.setattr(guard, "measure", measure)
    options = argparse.Namespace(benches=["broken", "gae"], tolerance=0.15)
    findings, failures = guard.run(options, {"gae": rows(10.0, 20.0)})
    assert list(findings) == ["gae"] and failures == ["broken: ended with status 3 and 0 files of rows"]


def test_a_bench_runs_in_a_process_of_its_own_and_its_rows_come_back():
    options = argparse.Namespace(device="cpu", rounds=1, full=False, verbose=False)
    benches = guard.measure("pack_padded", options, "1")
    (found,) = compare([], benches["pack_padded"])
    assert found.key == ("B8 L256", "time", "loop") and found.verdict == NEW
    assert {r["runs"] for r in benches["pack_padded"]} == {1}


def test_every_name_of_the_quick_benches_is_one():
    assert set(guard.QUICK) <= set(guard.modules())
    assert guard.modules()["rollout"] == "bench.rollout.bench_rollout"
