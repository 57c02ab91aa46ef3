"""`icegrt data preview`: what is trained on stands out, on a terminal and in a file, and text cannot play tricks."""

import json
import sys

import pytest

from icegrt import cli
from icegrt.commands.data_preview import kind_of
from icegrt.data import Row
from tests.helpers.data_rows import CHAT, PLAIN, make_tokenizer
from tests.helpers.terminal import run_on_terminal


@pytest.fixture
def files(tmp_path):
    make_tokenizer(PLAIN).save_pretrained(tmp_path / "model")
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


def test_colour_on_a_terminal_and_nothing_else_of_an_escape(files, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    command = [sys.executable, "-m", "icegrt", "data", "preview", str(files / "evil.jsonl"), "--model", str(files / "model")]  # fmt: skip # noqa: E501
    out, _ = run_on_terminal(command, environment={"TERM": "xterm-256color", "COLUMNS": "100"})
    assert b"\x1b[1;32m[/bold]no<|im_end|>\x1b[0m" in out and b"[red]ask" in out
    assert b"\x1b[31m" not in out and b"\x1b[2J" not in out and b"title" not in out


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "prompts"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "examples"),
        ({"prompt": "a", "responses": ["b", "c"]}, "prompts"),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [1, 0]}, "rankings"),
        ({"prompt": "a", "answer": "b"}, "prompts"),
    ],
)
def test_the_kind_of_rows_follows_from_what_they_hold(data, kind):
    assert kind_of(Row(data, "row 0")) == kind
