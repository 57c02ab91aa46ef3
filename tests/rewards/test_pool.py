"""Reward functions in worker processes: the same scores, and whatever a function does costs its worker and no more."""

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from icegrt.errors import ConfigError, RewardError
from icegrt.rewards import pool
from icegrt.rewards.sample import RewardResult
from tests.helpers import reward_cases as cases

LENGTHS = "return [float(len(s.text)) for s in samples]"
# Fails on the sample whose text is `bad`, in one way or another.
FAILURES = {
    "raises": "if any(s.text == 'bad' for s in samples): raise KeyError('truth')\n",
    "exits": "if any(s.text == 'bad' for s in samples): sys.exit(3)\n",
    "dies": "if any(s.text == 'bad' for s in samples): os._exit(3)\n",
    "crashes": "if any(s.text == 'bad' for s in samples): os.kill(os.getpid(), signal.SIGSEGV)\n",
    "hangs": "while any(s.text == 'bad' for s in samples): time.sleep(0.01)\n",
    "too large": "if len(samples) > 2: return [10 ** (999 * (s.text == 'bad')) for s in samples]\n",
}


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/{pid}/stat") as file:  # ended, and not yet reaped by whoever adopted it
        return file.read().rpartition(")")[2].split()[0] == "Z"


def wait_until_gone(pid, seconds=20.0):
    until = time.monotonic() + seconds
    while not gone(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return gone(pid)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_scores_do_not_depend_on_the_number_of_workers(tmp_path, workers):
    samples = cases.samples(*("x" * n for n in (3, 1, 4, 1, 5, 9, 2)))
    with cases.scorers(cases.function_file(tmp_path, LENGTHS), workers=workers) as sources:
        (source_scores,) = sources.score_by_source(samples)
        assert source_scores.score_or_nan_N == [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0]
        assert source_scores.errors == [None] * 7
        assert (source_scores.name, source_scores.weight) == ("score", 1.0)
        assert sources.score_by_source([])[0].score_or_nan_N == []


def test_answers_to_one_prompt_reach_one_worker_together_and_in_order(tmp_path):
    body = "return [1000.0 * len(samples) + 10 * i + s.index for i, s in enumerate(samples)]"
    mixed = [(0, 1), (2, 0), (1, 0), (0, 0), (1, 1), (2, 1)]
    samples = [dataclasses.replace(cases.sample("x", g, group=g), index=i) for g, i in mixed]
    with cases.scorers(cases.function_file(tmp_path, body), workers=3) as sources:
        assert sources.score_by_source(samples)[0].score_or_nan_N == [2011.0, 2000.0, 2000.0, 2000.0, 2011.0, 2011.0]


def test_a_worker_is_a_fresh_interpreter_without_torch(tmp_path):
    body = "return [float('torch' in sys.modules or 'numpy' in sys.modules or os.getppid() == 1) for s in samples]"
    with cases.scorers(cases.function_file(tmp_path, body)) as sources:
        assert sources.score_by_source(cases.samples("a"))[0].score_or_nan_N == [0.0]


def test_signals_and_event_loops_work_in_a_worker(tmp_path):
    # Checkers of mathematics and code limit their own time by SIGALRM, which only a main thread may set.
    body = (
        "import asyncio\nasync def score(samples):\n    signal.signal(signal.SIGALRM, lambda *a: None)\n"
        "    signal.alarm(0)\n    await asyncio.sleep(0)\n    return [2.0 for s in samples]"
    )
    with cases.scorers(cases.function_file(tmp_path, body)) as sources:
        assert sources.score_by_source(cases.samples("a", "b"))[0].score_or_nan_N == [2.0, 2.0]


@pytest.mark.parametrize("failure", FAILURES)
def test_only_the_response_at_fault_has_no_score(tmp_path, failure):
    samples = cases.samples("a", "bb", "bad", "dddd", "eeeee")
    spec = cases.function_file(tmp_path, FAILURES[failure] + LENGTHS)
    seconds = 1.0 if failure == "hangs" else 20.0
    with cases.scorers(spec, on_error="score", error_score=-1.0, timeout_seconds=seconds) as sources:
        (source_scores,) = sources.score_by_source(samples)
        assert (
            source_scores.score_or_nan_N[2] == -1.0
            and source_scores.errors[2] is not None
            and "data.jsonl:3" in source_scores.errors[2]
        )
        assert source_scores.errors[:2] + source_scores.errors[3:] == [None] * 4
        good = [1.0] * 4 if failure == "too large" else [1.0, 2.0, 4.0, 5.0]
        assert source_scores.score_or_nan_N[:2] + source_scores.score_or_nan_N[3:] == good
        assert sources.score_by_source(cases.samples("xyz"))[0].score_or_nan_N == [3.0]  # the next call finds a worker


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ("raises", r"raised KeyError: 'truth' in score_file\.py:3 \(at data\.jsonl:3, answer 'bad'\)"),
        ("exits", r"raised SystemExit: 3 in score_file\.py:3 \(at data\.jsonl:3"),
        ("dies", r"ended its process \(exit status 3\).*\(at data\.jsonl:3"),
        ("crashes", r"ended its process \(signal SIGSEGV\).*\(at data\.jsonl:3"),
        ("hangs", r"took longer than 1 s for 5 samples, the first of which is data\.jsonl:1; .*timeout_seconds"),
        ("too large", r"returned 10+\.\.\. for data\.jsonl:3; expected a finite number"),
    ],
)
def test_a_run_that_stops_says_why_and_where(tmp_path, failure, words):
    samples = cases.samples("a", "bb", "bad", "dddd", "eeeee")
    seconds = 1.0 if failure == "hangs" else 20.0
    with cases.scorers(cases.function_file(tmp_path, FAILURES[failure] + LENGTHS), timeout_seconds=seconds) as sources:
        with pytest.raises(RewardError, match=words):
            sources.score_by_source(samples)


def test_a_time_out_kills_the_worker_and_what_it_started(tmp_path):
    body = (
        "import subprocess\nchild = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\ntime.sleep(600)"
    )
    with cases.scorers(cases.function_file(tmp_path, body), timeout_seconds=2.0) as sources:
        with pytest.raises(RewardError, match="took longer than 2 s"):
            sources.score_by_source(cases.samples("a"))
        assert all(wait_until_gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_time_outs_end_once_one_culprit_could_have_been_found(tmp_path):
    # Every call hangs: 1 + log2(8) of them are waited for, not one for each of 8 responses.
    with cases.scorers(
        cases.function_file(tmp_path, "time.sleep(600)"), on_error="drop", timeout_seconds=0.5
    ) as sources:
        (source_scores,) = sources.score_by_source(cases.samples(*"abcdefgh"))
    assert all(source_scores.errors) and all(r.score is None for r in source_scores.results)


def test_a_failing_share_cancels_the_others(tmp_path):
    body = "if samples[0].text == 'a': raise ValueError('no')\nwhile True: time.sleep(0.01)"
    with cases.scorers(cases.function_file(tmp_path, body), workers=2, timeout_seconds=600.0) as sources:
        with pytest.raises(RewardError, match="ValueError: no"):
            sources.score_by_source(cases.samples("a", "b"))


def test_closing_ends_every_process(tmp_path):
    body = "time.sleep(0.05)\nreturn [float(os.getpid()) for s in samples]"
    with cases.scorers(cases.function_file(tmp_path, body), workers=2) as sources:
        pids = {int(pid) for pid in sources.score_by_source(cases.samples("a", "b"))[0].score_or_nan_N}
        assert len(pids) == 2 and not any(map(gone, pids))
    assert all(map(wait_until_gone, pids))


def test_a_worker_in_a_loop_ends_with_a_parent_that_is_killed(tmp_path):
    pid_file = tmp_path / "pid"
    spec = cases.function_file(tmp_path, f"open({str(pid_file)!r}, 'w').write(str(os.getpid()))\nwhile True: pass")
    code = (
        "import sys; sys.path[:0] = ['']\nfrom tests.helpers import reward_cases as cases\n"
        f"cases.scorers({spec!r}).score_by_source(cases.samples('a'))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2])
    while not (pid_file.exists() and pid_file.read_text()):
        assert parent.poll() is None
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    assert wait_until_gone(int(pid_file.read_text()))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return [object() for s in samples]", "expected a finite number"),
        ("return [lambda: 1 for s in samples]", "expected a finite number"),
        (
            "from icegrt import RewardResult\ndef score(samples):\n"
            "    return [RewardResult(1.0, {'f': open(__file__)}) for s in samples]",
            "the metric 'f'",
        ),
        (
            "class Odd(Exception):\n    def __init__(self, a, b): ...\ndef score(samples):\n    raise Odd(1, 2)",
            "raised Odd",
        ),
    ],
)
def test_what_cannot_be_pickled_is_refused_in_words(tmp_path, body, words):
    with cases.scorers(cases.function_file(tmp_path, body)) as sources, pytest.raises(RewardError, match=words):
        sources.score_by_source(cases.samples("a"))


def test_a_row_that_cannot_be_sent_says_so(tmp_path):
    with cases.scorers(cases.function_file(tmp_path, LENGTHS)) as sources:
        with pytest.raises(RewardError, match=r"data\.jsonl:1 cannot be sent.*ppo\.reward\.workers=0"):
            sources.score_by_source(cases.samples("a", prompt="x", odd=lambda: 1))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def other(samples): ...", "has no function `score`"),
        ("def score(samples:\n", r"SyntaxError: .*\(score_file\.py, line 2\)"),
        ("raise RuntimeError('no key')\ndef score(samples): ...", r"RuntimeError: no key in score_file\.py:2"),
        ("os._exit(4)\ndef score(samples): ...", r"ended its process \(exit status 4\)"),
        ("time.sleep(600)\ndef score(samples): ...", "took longer than 1 s"),
        (
            "def score(samples, model): ...",
            r"`score\(samples, model\)` in score_file\.py:2 is no reward",
        ),
    ],
)
def test_what_cannot_be_loaded_is_refused_before_anything_is_scored(tmp_path, monkeypatch, body, words):
    monkeypatch.setattr(pool, "MIN_LOAD_TIMEOUT_S", 1.0)
    with pytest.raises(ConfigError, match=words) as error_info:
        cases.scorers(cases.function_file(tmp_path, body), timeout_seconds=1.0 if "600" in body else 20.0)
    assert str(error_info.value).startswith("ppo.reward_function: ")


# -- functions that only this process has -------------------------------------------------------------------------


def test_a_function_in_memory_is_called_here_and_keeps_its_state():
    pids = []

    def score(samples):
        pids.append(os.getpid())
        return [1.0] * len(samples)

    with cases.scorers(score, workers=4) as sources:
        sources.score_by_source(cases.samples("a", "b"))
    assert pids == [os.getpid()]


def test_a_function_in_memory_has_a_time_limit_too():
    def score(samples):
        time.sleep(0.0 if samples[0].text == "fast" else 3.0)
        return [1.0] * len(samples)

    with cases.scorers(score, timeout_seconds=0.2) as sources:
        assert sources.score_by_source(cases.samples("fast"))[0].score_or_nan_N == [1.0]
        with pytest.raises(RewardError, match=r"took longer than 0\.2 s"):
            sources.score_by_source(cases.samples("slow"))


def test_an_interrupt_in_memory_is_not_swallowed():
    def score(samples):
        raise KeyboardInterrupt

    with cases.scorers(score) as sources, pytest.raises(KeyboardInterrupt):
        sources.score_by_source(cases.samples("a"))


@pytest.mark.parametrize("seconds", [0.0, 20.0])
def test_an_async_function_works_where_a_loop_is_running(seconds):
    async def score(samples):
        await asyncio.sleep(0)
        return [float(len(s.text)) for s in samples]

    async def notebook():
        with cases.scorers(score, timeout_seconds=seconds) as sources:
            return sources.score_by_source(cases.samples("a", "bb"))[0].score_or_nan_N

    assert asyncio.run(notebook()) == [1.0, 2.0]


def test_an_async_function_that_raises_names_its_row():
    async def score(samples):
        await asyncio.sleep(0)
        return [1.0 / (s.text != "bad") for s in samples]

    with cases.scorers(score) as sources, pytest.raises(RewardError, match=r"ZeroDivisionError.*at data\.jsonl:2"):
        sources.score_by_source(cases.samples("a", "bad"))


# -- results --------------------------------------------------------------------------------------------------------


def test_results_carry_metrics_and_token_rewards(tmp_path):
    body = (
        "from icegrt import RewardResult\ndef score(samples):\n"
        "    return [RewardResult(len(s.text), {'long': len(s.text) > 1}, [0.5] * len(s.tokens)) for s in samples]"
    )
    with cases.scorers(cases.function_file(tmp_path, body)) as sources:
        (source_scores,) = sources.score_by_source(cases.samples("a", "bb"))
    assert source_scores.results == [
        RewardResult(1.0, {"long": 0.0}, [0.5]),
        RewardResult(2.0, {"long": 1.0}, [0.5, 0.5]),
    ]


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (
            RewardResult(1.0, {}, [1.0]),
            "returned 1 token_rewards_A for data.jsonl:1; .* the answer's 2 tokens",
        ),
        (RewardResult(1.0, {}, [1.0, float("nan")]), r"nan as token_rewards_A\[1\] for data.jsonl:1"),
        (RewardResult(float("inf")), "returned inf for data.jsonl:1"),
        (RewardResult(1e39), "returned 1e.39 for data.jsonl:1"),
        (RewardResult(1.0, {"x": float("nan")}), "the metric 'x' as nan"),
        (RewardResult(1.0, {3: 1.0}), "the metric 3"),
        (RewardResult(1.0, [1.0]), "the metric 'metrics'"),
    ],
    ids=["short", "NaN token", "inf", "beyond float32", "NaN metric", "unnamed metric", "no mapping"],
)
def test_results_that_cannot_be_used(result, words):
    with cases.scorers(lambda samples: [result]) as sources, pytest.raises(RewardError, match=words):
        sources.score_by_source(cases.samples("ab"))


def test_no_opinion_is_no_error_and_is_paid_nothing():
    def score(samples):
        return [RewardResult(None) if s.text == "b" else 2.0 for s in samples]

    with cases.scorers(score) as sources:
        (source_scores,) = sources.score_by_source(cases.samples("a", "b"))
    assert (
        source_scores.errors == [None, None]
        and source_scores.score_or_nan_N[0] == 2.0
        and source_scores.results[1].score is None
    )


# -- several --------------------------------------------------------------------------------------------------------


def test_every_source_has_a_name_of_its_own(tmp_path):
    def score(samples):
        return [0.0] * len(samples)

    named = cases.RewardSpec(function=score, name="score")
    sources = cases.RewardSourceGroup.of(
        [
            cases.RewardSpec(function=score),
            named,
            cases.RewardSpec(function=score),
            cases.RewardSpec(url="http://h:1/x"),
        ],
        cases.RewardCallConfig(),
    )
    assert [source.name for source in sources.scorers] == ["score_2", "score", "score_3", "h:1"]
    for bad, words in (("reward_model", "is the name of the reward model"), ("a b", "expected letters")):
        with pytest.raises(ConfigError, match=words):
            cases.RewardSourceGroup.of([cases.RewardSpec(function=score, name=bad)], cases.RewardCallConfig())
    with pytest.raises(ConfigError, match="`score` is given twice"):
        cases.RewardSourceGroup.of([named, named], cases.RewardCallConfig())


def test_a_probe_refuses_a_source_that_scores_nothing_whatever_on_error_says():
    def score(samples):
        raise ValueError("always")

    with cases.scorers(score, on_error="drop") as sources:
        with pytest.raises(RewardError, match=r"`score` could score none of 2 answers: .*ValueError: always"):
            sources.probe(cases.samples("a", "b"))


def test_a_worker_that_dies_between_two_calls_is_restarted(tmp_path, capsys):
    body = "return [float(os.getpid())] * len(samples)"
    with cases.scorers(cases.function_file(tmp_path, body), workers=1) as sources:
        first = int(sources.score_by_source(cases.samples("x"))[0].score_or_nan_N[0])
        os.kill(first, signal.SIGKILL)
        os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)  # all its threads have ended; the pool reaps it
        second = int(sources.score_by_source(cases.samples("x"))[0].score_or_nan_N[0])
    assert second != first
    assert "`score`: its process ended between two calls (signal SIGKILL); it is restarted" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("seconds", [3e6, 1e10])
def test_a_time_limit_beyond_what_the_system_counts_is_none(tmp_path, workers, seconds):
    function = cases.function_file(tmp_path, LENGTHS)
    with cases.scorers(function, workers=workers, timeout_seconds=seconds) as sources:
        assert sources.score_by_source(cases.samples("abc"))[0].score_or_nan_N == [3.0]


def test_files_with_helpers_of_one_name_get_their_own_in_workers(tmp_path):
    functions = [file_with_helper(tmp_path / folder, value) for folder, value in (("a", 1.0), ("b", 2.0))]
    with cases.scorers(*functions, workers=1) as sources:
        assert [s.score_or_nan_N for s in sources.score_by_source(cases.samples("x"))] == [[1.0], [2.0]]


@pytest.mark.parametrize("where", ["at the top", "inside"])
def test_files_with_helpers_of_one_name_are_refused_in_one_process(tmp_path, where):
    functions = [file_with_helper(tmp_path / folder, 1.0, where) for folder in ("a", "b")]
    with pytest.raises(ConfigError, match=r"imports `helper_\w+_shared`, .*b.*but this process has another"):
        cases.scorers(*functions, workers=0)


def file_with_helper(folder, value, where="at the top"):
    folder.mkdir()
    helper = f"helper_{'top' if where == 'at the top' else 'inside'}_shared"
    (folder / f"{helper}.py").write_text(f"VALUE = {value}\n")
    lines = f"import {helper}\n" if where == "at the top" else ""
    inside = "" if lines else f"    import {helper}\n"
    (folder / "reward.py").write_text(
        f"{lines}def score(samples):\n{inside}    return [{helper}.VALUE] * len(samples)\n"
    )
    return f"{folder / 'reward.py'}:score"


def test_all_answers_to_one_prompt_are_one_group_whatever_their_rows(tmp_path):
    body = "return [100.0 * s.group + 10 * s.index + len(samples) for s in samples]"
    shown = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0)]
    samples = [dataclasses.replace(cases.sample("x", g), group=g, index=i) for g, i in shown]
    samples = [dataclasses.replace(s, prompt_tokens=[2, 3]) if s.group < 2 else s for s in samples]  # rows 0 and 1
    with cases.scorers(cases.function_file(tmp_path, body), workers=2) as sources:
        assert sources.score_by_source(samples)[0].score_or_nan_N == [4.0, 24.0, 14.0, 34.0, 201.0]
