"""Tasks of a study: side by side within the limits, recorded when they end, stopped and continued."""

import os
import signal
import sys
import time

import pytest

from icegrt.errors import RunError
from icegrt.study.grid import Task
from icegrt.study.runner import LOG_FILE, Limits, lock_study, read_record, run_tasks

FINE = Limits(places=2, grace_seconds=5)
# Writes its process id into its folder, and more into a folder that the tasks share.
PREFIX = (
    "import os, pathlib, signal, sys, time; out = pathlib.Path({out!r}); (out / 'pid').write_text(str(os.getpid()))\n"
)


def task_of(folder, name, code="", ranks=1, keeps_partial=False, fingerprint="one"):
    task = Task(name, folder / name, (), ranks, keeps_partial, fingerprint)
    words = (sys.executable, "-S", "-c", PREFIX.format(out=str(task.out)) + code)
    return Task(name, folder / name, words, ranks, keeps_partial, fingerprint)


def run(tasks, folder, limits=FINE, **options):
    with lock_study(folder / "lock") as lock:
        run_tasks(tasks, limits, lock, label="test", **options)


def is_alive(task):
    """Whether the process of a task runs; one that has ended and was not reaped does not."""
    try:
        with open(f"/proc/{(task.out / 'pid').read_text()}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def test_every_task_is_recorded_and_runs_once(tmp_path):
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    tasks = [task_of(tmp_path, "a", count), task_of(tmp_path, "b", f"{count}; print('over'); sys.exit(3)")]
    for _ in range(2):
        run(tasks, tmp_path, versions={"python": "4"})
    assert (tmp_path / "count").read_text() == "xx"
    good, bad = map(read_record, tasks)
    assert (good["status"], good["reason"], good["log_tail"], good["versions"]) == ("finished", "", [], {"python": "4"})
    assert (bad["status"], bad["reason"], bad["log_tail"]) == ("failed", "it ended with exit status 3", ["over"])


def test_failed_tasks_run_again_when_asked_in_a_cleared_folder(tmp_path):
    fails_once = f"first = {str(tmp_path / 'first')!r}\nif not os.path.exists(first): open(first, 'w'); sys.exit(1)"
    leaves = "\nassert not (out / 'left').exists(); (out / 'left').touch()"
    task = task_of(tmp_path, "a", leaves.strip() + "\n" + fails_once, keeps_partial=True)
    run([task], tmp_path)
    assert read_record(task)["status"] == "failed"
    run([task], tmp_path, retry_failed=True)
    assert read_record(task)["status"] == "finished"


def test_a_task_that_exits_well_may_have_failed_all_the_same(tmp_path):
    task = task_of(tmp_path, "a")
    run([task], tmp_path, problem_of=lambda task: "no number")
    assert (read_record(task)["status"], read_record(task)["reason"]) == ("failed", "no number")


def test_a_command_that_cannot_start_is_a_failed_task(tmp_path):
    task = Task("a", tmp_path / "a", ("/no/such/command",), 1, False, "one")
    run([task, task_of(tmp_path, "b")], tmp_path)
    assert read_record(task)["reason"] == "the command cannot be started"
    assert read_record(task)["log_tail"] == ["/no/such/command: No such file or directory"]


@pytest.mark.parametrize(("places", "ranks", "most"), [(2, 1, 2), (3, 1, 3), (2, 2, 1), (1, 4, 1)])
def test_as_many_ranks_run_at_a_time_as_there_are_places(tmp_path, places, ranks, most):
    # Each task waits until `most` have started, and would fail if one more had started than ended.
    shared = str(tmp_path / "shared")
    os.mkdir(shared)
    code = f"""
me = pathlib.Path({shared!r}) / str(os.getpid())
me.with_suffix('.started').touch()
count = lambda kind: len([n for n in os.listdir({shared!r}) if n.endswith(kind)])
assert count('started') - count('ended') <= {most}
deadline = time.monotonic() + 60
while count('started') < {most} and time.monotonic() < deadline: time.sleep(0.01)
assert count('started') >= {most}
me.with_suffix('.ended').touch()
"""
    tasks = [task_of(tmp_path, str(n), code, ranks) for n in range(3)]
    run(tasks, tmp_path, Limits(places, grace_seconds=5))
    assert [read_record(task)["reason"] for task in tasks] == ["", "", ""]


def test_a_task_over_its_time_is_stopped_and_killed_if_it_does_not_leave(tmp_path):
    ready = "\npathlib.Path(out / 'ready').touch(); time.sleep(600)"
    tasks = [
        task_of(tmp_path, "leaves", "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))" + ready),
        task_of(tmp_path, "stays", "signal.signal(signal.SIGTERM, signal.SIG_IGN)" + ready),
    ]
    run(tasks, tmp_path, Limits(2, seconds=1.5, grace_seconds=0.3))
    for task in tasks:
        assert read_record(task)["reason"] == "it took longer than 1.5 s and was stopped"
        assert not is_alive(task)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_every_task_and_the_next_call_continues(tmp_path, number):
    first = str(tmp_path / "first")
    # The first task ends, the second one interrupts the study once; both are started again only if they did not end.
    code = f"""
(out / 'attempts').open('a').write('x')
if not os.path.exists({first!r}):
    while not os.path.exists({str(tmp_path / "a" / "record.json")!r}): time.sleep(0.01)
    open({first!r}, 'w'); os.kill(os.getppid(), {int(number)}); time.sleep(600)
"""
    tasks = [task_of(tmp_path, "a", "(out / 'attempts').open('a').write('x')"), task_of(tmp_path, "b", code, 1, True)]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run(tasks, tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not is_alive(tasks[1]) and read_record(tasks[1]) is None
    run(tasks, tmp_path)
    assert [(task.out / "attempts").read_text() for task in tasks] == ["x", "xx"]
    assert [read_record(task)["resumed"] for task in tasks] == [False, True]


def test_a_partial_task_starts_in_a_clean_folder_unless_it_can_continue_the_same_command(tmp_path):
    code = "assert (out / 'partial').exists() == {}"
    for name, keeps, fingerprint, expected in (
        ("clears", False, "one", False),
        ("continues", True, "one", True),
        ("differs", True, "two", False),
    ):
        task = task_of(tmp_path, name, code.format(expected), 1, keeps)
        task.out.mkdir(parents=True)
        (task.out / "partial").touch()
        (task.folder / "started.json").write_text(f'{{"fingerprint": "{fingerprint}"}}')
        run([task], tmp_path)
        assert read_record(task)["status"] == "finished", name


def test_a_run_of_another_command_is_kept_aside(tmp_path):
    run([task_of(tmp_path, "a", "(out / 'result').touch()")], tmp_path)
    changed = task_of(tmp_path, "a", fingerprint="two")
    assert read_record(changed) is None
    run([changed], tmp_path)
    assert read_record(changed)["status"] == "finished"
    assert (tmp_path / "a.earlier_1" / "run" / "result").exists() and not (changed.out / "result").exists()


def test_ranks_and_threads_of_a_task_do_not_come_from_this_process(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("KEPT", "yes")
    names = "RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS", "KEPT"
    tasks = [task_of(tmp_path, str(n), f"print(*[os.environ.get(n, '-') for n in {names}])", n) for n in (1, 2)]
    run(tasks, tmp_path, Limits(2, threads=3))
    logs = [(task.folder / LOG_FILE).read_text().split() for task in tasks]
    assert logs == [["0", "1", "-", "-", "3", "yes"], ["-", "-", "-", "-", "3", "yes"]]


def test_a_folder_has_one_study_at_a_time(tmp_path):
    with lock_study(tmp_path):
        with pytest.raises(RunError, match="another `icegrt study`"):
            with lock_study(tmp_path, timeout_seconds=0):
                pass
    with lock_study(tmp_path, timeout_seconds=0):
        pass


def test_a_run_that_was_left_over_holds_the_lock(tmp_path):
    task = task_of(tmp_path, "a", "time.sleep(600)")
    pid = os.fork()
    if pid == 0:  # a study that dies without a word, on a system without a death signal
        import icegrt.study.runner as runner

        runner._sigterm_when_parent_dies = lambda: None
        runner.console.is_quiet = lambda: True
        try:
            run([task], tmp_path)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 60
    while not (task.out / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        assert is_alive(task)
        with pytest.raises(RunError, match="or a run that it started"):
            with lock_study(tmp_path / "lock", timeout_seconds=0):
                pass
    finally:
        os.kill(int((task.out / "pid").read_text()), signal.SIGKILL)
    with lock_study(tmp_path / "lock", timeout_seconds=30):
        pass
