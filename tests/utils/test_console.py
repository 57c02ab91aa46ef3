"""What is printed where: terminals, logs, other ranks, quiet mode, and text that a model wrote."""

import io
import subprocess
import sys

import pytest

from icegrt.utils import console
from tests.helpers.terminal import run_on_terminal


class Clock:
    """Time that passes only when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def work(self, progress, seconds, n=1, **fields):
        self.now += seconds
        progress.advance(n, **fields)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "ICEGRT_QUIET"):
        monkeypatch.delenv(name, raising=False)


def test_control_characters_of_a_models_text_do_not_reach_the_terminal():
    text = "a\x1b[31mred\x1b[0m\x1b]0;title\x07\x1b]8;;http://x\x1b\\link\x07\x00\x9b2J\u202eevil\r\nb\tc\rd"
    assert console.plain(text) == "aredlinkevil\nb\tcd"
    assert console.plain("stray \x1b]0;no end") == "stray 0;no end"
    assert console.plain("x[i] = [bold]é 日本[/bold] 🙂") == "x[i] = [bold]é 日本[/bold] 🙂"
    assert console.plain(3) == "3"


def test_lines_go_to_stdout_and_warnings_to_stderr(capsys):
    console.print_info("x \x1b[31m[bold]y[/]")
    console.warn("z")
    out, err = capsys.readouterr()
    assert (out, err) == ("x [bold]y[/]\n", "warning: z\n")


def test_only_rank_zero_prints(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    clock = Clock()
    console.print_info("x")
    console.warn("x")
    console.table(["a"], [["x"]])
    with console.progress(1, "x", clock=clock) as work:
        clock.work(work, 60)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    console.print_info("x")
    assert capsys.readouterr().out == "x\n"


@pytest.mark.parametrize("by", ["context", "environment"])
def test_quiet_mode_silences_lines_and_progress_but_not_warnings(capsys, monkeypatch, by):
    clock = Clock()

    def work():
        console.print_info("x")
        with console.progress(2, "x", clock=clock) as progress:
            clock.work(progress, 60)
            assert progress.done == 1
        console.warn("kept")

    if by == "context":
        with console.quiet():
            work()
        assert not console.is_quiet()
    else:
        monkeypatch.setenv("ICEGRT_QUIET", "1")
        work()
        monkeypatch.setenv("ICEGRT_QUIET", "0")
        assert not console.is_quiet()
    assert capsys.readouterr() == ("", "warning: kept\n")


def test_without_a_terminal_progress_is_a_line_after_2_s_then_each_10_s_and_one_at_the_end(capsys):
    clock, lines = Clock(), []
    with console.progress(60, "rollout", "responses", clock=clock) as work:
        for _ in range(60):
            clock.work(work, 0.5, loss=1.23456789, note="a\nb")
            lines += [(clock.now - 100, line) for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        (2, "rollout: 4/60 responses (7%)  2 responses/s  28.0 s left  loss 1.235  note a b"),
        (12, "rollout: 24/60 responses (40%)  2 responses/s  18.0 s left  loss 1.235  note a b"),
        (22, "rollout: 44/60 responses (73%)  2 responses/s  8.0 s left  loss 1.235  note a b"),
    ]
    assert capsys.readouterr().err == "rollout: 60 responses in 30.0 s  2 responses/s  loss 1.235  note a b\n"


def test_short_work_prints_nothing(capsys):
    clock = Clock()
    with console.progress(3, "short", clock=clock) as work:
        for _ in range(3):
            clock.work(work, 0.5)
    assert capsys.readouterr().err == ""


def test_an_unknown_total_shows_count_and_rate(capsys):
    clock = Clock()
    with console.progress(None, "reading", "rows", clock=clock) as work:
        clock.work(work, 4, 10_000)
    assert capsys.readouterr().err == (
        "reading: 10,000 rows  2,500 rows/s\nreading: 10,000 rows in 4.0 s  2,500 rows/s\n"
    )


def test_work_that_fails_says_how_far_it_came_and_lets_the_error_through(capsys):
    clock = Clock()
    with pytest.raises(KeyError), console.progress(10, "training", "steps", clock=clock) as work:
        clock.work(work, 1)
        clock.work(work, 4)
        raise KeyError
    assert capsys.readouterr().err.splitlines()[-1] == "training: stopped at 2/10 steps (20%) after 5.0 s  0.4 steps/s"


def test_no_total_no_unit_and_no_time_divide_by_nothing(capsys):
    clock = Clock()
    with console.progress(0, "nothing", clock=clock) as work:
        work.advance(0)
        clock.work(work, 3, 0)
    assert capsys.readouterr().err.splitlines()[-1] == "nothing: 0 in 3.0 s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "40.0 ms"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_durations_are_short(seconds, text):
    assert console.duration(seconds) == text


def test_a_table_without_a_terminal_is_aligned_text(capsys):
    console.table(["name", "value"], [["a", 1], ["longer", "[red]x\x1b[31m"]])
    assert capsys.readouterr().out == "name    value\na       1\nlonger  [red]x\n"


def test_a_log_that_cannot_hold_a_letter_does_not_end_the_run(monkeypatch):
    log = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", log)
    console.print_info("é日")
    assert log.buffer.getvalue() == b"??\n"


def test_rich_is_not_imported_without_a_terminal():
    code = (
        "import sys; from icegrt.utils import console\n"
        "with console.progress(1, 'x') as p: p.advance()\n"
        "console.table(['a'], [['b']]); console.print_info('c')\n"
        "assert 'rich' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


NESTED = """
from icegrt.utils import console
from tests.helpers.terminal import run_on_terminal
class Clock:
    now = 0.0
    def __call__(self):
        Clock.now += 0.5
        return Clock.now
with console.progress(2, "outer[/b]", "steps", clock=Clock()) as outer:
    for _ in range(2):
        with console.progress(2, "inner", "rows", clock=Clock()) as inner:
            inner.advance(text="[red]\\x1b[31mhi")
            inner.advance()
        console.print_info("said [/x]")
        outer.advance(loss=0.5)
console.table(["a"], [["[/x]"]])
"""


def on_terminal(code, redirect_stdout=False):
    """Run `code` on a pseudo-terminal; return what it displays and what goes to a redirected stdout."""
    environment = {"TERM": "xterm", "COLUMNS": "160"}
    command = [sys.executable, "-c", code]
    display, stdout = run_on_terminal(command, environment=environment, redirect_stdout=redirect_stdout)
    return display.decode(), stdout.decode()


def test_on_a_terminal_nested_bars_share_one_display_and_markup_is_only_text():
    display, _ = on_terminal(NESTED)
    assert "outer[/b]" in display and "inner" in display and "━" in display
    assert "[red]hi" in display and "\x1b[31mhi" not in display
    assert "said [/x]" in display
    assert "outer[/b]: 2 steps in" in display
    assert display.count("\x1b[?25l") == display.count("\x1b[?25h") == 1  # the cursor is hidden once and comes back


def test_a_redirected_stdout_keeps_its_lines_while_bars_are_shown():
    display, out = on_terminal(NESTED, redirect_stdout=True)
    assert out == "said [/x]\nsaid [/x]\na\n[/x]\n"
    assert "said" not in display and "━" in display


def test_styled_pieces_show_markup_and_lose_escapes(capsys, monkeypatch):
    console.styled([("[red]a\x1b[31m", "bold"), ("b\u202e[/red]", "dim")])
    assert capsys.readouterr().out == "[red]ab[/red]\n"
    with console.quiet():
        console.styled([("a", "bold")])
    assert capsys.readouterr().out == ""


STOPPED = """
import os, signal
from icegrt.training.stop_signals import capture_stop_signals
from icegrt.utils import console
class Clock:
    now = 0.0
    def __call__(self):
        Clock.now += 0.5
        return Clock.now
with capture_stop_signals():
    with console.progress(9, "outer", "steps", clock=Clock()) as outer:
        outer.advance()
        with console.progress(9, "inner", "rows", clock=Clock()) as inner:
            inner.advance()
            os.kill(os.getpid(), signal.SIGINT)
            inner.advance()
            console.print_info("in between")
        outer.advance()
console.print_info("saved")
with console.progress(9, "later", "steps", clock=Clock()) as bar:
    bar.advance()
"""


def test_no_bar_is_drawn_after_the_message_of_a_stop_signal():
    display, _ = on_terminal(STOPPED)
    before, _, after = display.partition("SIGINT: saving after this step; a second one leaves at once\r\n\r\n")
    assert "outer" in before and "inner" in before and "━" in before
    stopped, _, later = after.partition("saved")
    assert "━" not in stopped and "in between" in stopped
    # What rich erases on its way up are the empty lines below the message.
    assert stopped.partition("in between")[0].count("\x1b[1A") <= 1
    assert "━" in later
