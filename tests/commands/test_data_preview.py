"""`icegrt data preview`: what is trained on stands out, on a terminal and in a file, and text cannot play tricks."""

import json
import os
import pty
import subprocess
import sys

import pytest

from icegrt import cli
from tests.helpers.data_rows import CHAT, PLAIN, make


@pytest.fixture
def files(tmp_path):
    make(PLAIN).save_pretrained(tmp_path / "model")
    rows = {
        "talk": {"messages": CHAT},
        "pair": {"prompt": "ask", "chosen": "good", "rejected": "bad"},
        "prompt": {"prompt": "ask"},
        "evil": {"prompt": "[red]ask\x1b[31m\x1b]0;title\x07\u202e", "response": "[/bold]no\x1b[2J\x08"},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


def preview(folder, name, capsys, *options):
    assert cli.main(["data", "preview", str(folder / f"{name}.jsonl"), "--model", str(folder / "model"), *options]) == 0
    return capsys.readouterr().out


def test_trained_text_stands_between_brackets(files, capsys):
    out = preview(files, "talk", capsys)
    assert out.splitlines()[0] == f"-- {files}/talk.jsonl:1: 71 tokens, 12 trained on"
    assert "assistant\n[[call<|im_end|>]]\n<|im_start|>tool\nresult<|im_end|>" in out
    assert "[[answer<|im_end|>]]" in out and out.count("[[") == 2


def test_pairs_and_prompts(files, capsys):
    out = preview(files, "pair", capsys)
    assert "1: [[good<|im_end|>]]" in out and "0: [[bad<|im_end|>]]" in out
    out = preview(files, "prompt", capsys)
    assert "none trained on" in out and "[[" not in out and out.rstrip().endswith("<|im_start|>assistant")


def test_rows_that_would_be_left_out_say_so(files, capsys):
    out = preview(files, "talk", capsys, "--max-length", "20", "--truncation", "drop")
    assert out == f"-- {files}/talk.jsonl:1: dropped, longer than 20 tokens\n"


def test_control_characters_and_markup_are_harmless_in_a_file(files, capsys):
    out = preview(files, "evil", capsys)
    assert "[red]ask" in out and "[/bold]no" in out
    assert not [c for c in out if ord(c) < 32 and c != "\n"] and "\u202e" not in out and "title" not in out


def test_colour_on_a_terminal_and_nothing_else_of_an_escape(files):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "icegrt", "data", "preview", str(files / "evil.jsonl"), "--model", str(files / "model")]  # fmt: skip # noqa: E501
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL, env=environment) as process:
        os.close(theirs)
        out = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            out += part
    os.close(ours)
    assert process.returncode == 0
    assert b"\x1b[1;32m[/bold]no<|im_end|>\x1b[0m" in out and b"[red]ask" in out
    assert b"\x1b[31m" not in out and b"\x1b[2J" not in out and b"title" not in out
