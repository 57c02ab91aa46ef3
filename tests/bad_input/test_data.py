"""Bad data files, tokenizers and chat templates: each is refused by name, through the real command, before training."""

import json
import os

import pytest

from tests.helpers.data_cases import (
    GOOD,
    GOOD_RANKING,
    Case,
    check_case_refused,
    checkpoint,
    lines,
    parquet,
    text,
    turns,
)

USER, BOT = ("user", "hi"), ("assistant", "ab")
TURN = "<{{ m.role }}>{{ m.content }}<eos>"
LOOP = "{% for m in messages %}" + TURN + "{% endfor %}"
START = "{% if add_generation_prompt %}<assistant>{% endif %}"
NO_MARKS = "{% for m in messages %}<{{ m.role }}>{% generation %}{% endgeneration %}{{ m.content }}<eos>{% endfor %}"
ONLY_LAST = "{% for m in messages %}{% if loop.last or m.role == 'user' %}" + TURN + "{% endif %}{% endfor %}"
ONLY_USER = "{% for m in messages %}{% if m.role == 'user' %}" + TURN + "{% endif %}{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ 1 / 0 }}{% endif %}" + LOOP
SHORT = "sample.sampling.max_new_tokens=8"
SEVERAL = turns(USER, BOT, ("user", "go on"), ("assistant", "cd"))


def linked_to_unreadable(folder):
    # Root may read what the mode forbids; a process's own memory refuses everyone at offset 0.
    (folder / "bad.jsonl").symlink_to("/proc/self/mem")
    return folder / "bad.jsonl"


def a_folder(folder):
    (folder / "bad.jsonl").mkdir()
    return folder / "bad.jsonl"


def a_pipe(folder):
    os.mkfifo(folder / "bad.jsonl")
    return folder / "bad.jsonl"


def no_tokenizer(folder):
    path = checkpoint()(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).unlink()
    return path


def broken(name, content):
    """Good rows beside a checkpoint with this file in place of its own."""

    def make(folder):
        path = checkpoint()(folder)
        (folder / "model" / name).write_text(content)
        return path

    return make


FILES = [
    Case("cut line", lines(GOOD, '{"prompt": "hi"'), ("{path}:2: not JSON", "column")),
    Case("single quotes", lines("{'prompt': 'a'}"), ("{path}:1: not JSON",)),
    Case("two objects on a line", lines(GOOD, json.dumps(GOOD) * 2), ("{path}:2: not JSON",)),
    Case("indented JSON", text('{\n  "prompt": "a"\n}\n'), ("{path}:1: not JSON", "one object a line")),
    Case("an array of rows", text(json.dumps([GOOD, GOOD]), "bad.json"), ("{path}:1:", "JSON object", "a list")),
    Case("no object", lines(GOOD, "17"), ("{path}:2:", "JSON object", "a number")),
    Case("a key twice", lines('{"prompt": "a", "prompt": "b", "response": "c"}'), ("{path}:1: key `prompt`", "twice")),
    Case("a nested key twice", lines('{"prompt": "a", "response": "b", "x": {"k": 1, "k": 2}}'), ("`k` stands twice",)),
    Case("Latin-1", text(b'{"prompt": "caf\xe9", "response": "b"}\n'), ("{path}:1: not UTF-8", "0xe9", "UTF-8")),
    Case("UTF-16", text(json.dumps(GOOD).encode("utf-16")), ("{path}:1: UTF-16", "save the file as UTF-8")),
    Case("UTF-32", text(json.dumps(GOOD).encode("utf-32")), ("{path}:1: UTF-32", "save the file as UTF-8")),
    Case("NUL bytes", text(json.dumps(GOOD).encode() + b"\n" + b"\0" * 40 + b"\n"), ("{path}:2: NUL byte", "damaged")),
    Case("UTF-16 without a mark", text(json.dumps(GOOD).encode("utf-16-le")), ("{path}:1: NUL byte", "UTF-8")),
    Case("nested too deeply", lines("[" * 100_000), ("{path}:1: nested too deeply",)),
    Case("a number of 5,000 digits", lines('{"prompt": "a", "response": "b", "n": %s}' % ("9" * 5000)), ("{path}:1:",)),
    Case("empty", text(""), ("{path}: no rows",)),
    Case("blank lines only", text("\n \n\t\n"), ("{path}: no rows",)),
    Case("a byte order mark and nothing else", text(b"\xef\xbb\xbf"), ("{path}: no rows",)),
    Case("missing", lambda folder: folder / "bad.jsonl", ("{path}: no such file", "relative paths start at")),
    Case("a folder", a_folder, ("{path}: is a folder", "JSONL")),
    Case("a pipe", a_pipe, ("{path}: not a regular file",)),
    Case("unreadable", linked_to_unreadable, ("{path}: ",)),
    Case("CSV", text("prompt,response\na,b\n", "bad.csv"), ("{path}: .csv is not read", ".parquet")),
    Case("gzip", text(b"\x1f\x8b\x08", "bad.jsonl.gz"), ("{path}: .gz is not read", "unpack it")),
    Case("gzip named JSONL", text(b"\x1f\x8b\x08\x00\x00"), ("{path}: compressed with gzip", "unpack it")),
    Case("Parquet named JSONL", parquet({"prompt": ["a"]}, "bad.jsonl"), ("{path}: a Parquet file", ".parquet")),
    Case("Parquet cut short", parquet(dict(prompt=["a"]), damage=lambda b: b[:-9]), ("{path}: not a Parquet file",)),
    Case(
        "Parquet damaged",
        parquet(dict(prompt=["a"]), damage=lambda b: b[:4] + b"\0" * (len(b) - 8) + b[-4:]),
        ("{path}: not a Parquet file", "copy or write it again"),
    ),
    Case("text named Parquet", text(json.dumps(GOOD) * 9, "bad.parquet"), ("{path}: not a Parquet file",)),
    Case("Parquet without rows", parquet(dict(prompt=[], response=[])), ("{path}: no rows",)),
    Case("Parquet of numbers", parquet(dict(prompt=[1, 2], response=["a", "b"])), ("{path}:row 0", "`prompt`", "int")),
    Case("Parquet columns twice", parquet({"prompt": ["a"], "prompt ": ["b"]}), ("{path}: column `prompt`", "twice")),
]

ROWS = [
    Case("empty prompt", lines(GOOD, GOOD | {"prompt": " "}), ("{path}:2: key `prompt`: is empty",)),
    Case("empty response", lines(GOOD | {"response": ""}), ("{path}:1: key `response`: is empty",)),
    Case("no response", lines({"prompt": "a"}), ("{path}:1: columns found: `prompt`", "`response`")),
    Case("unknown columns", lines({"question": "a", "answer": "b"}), ("`question`, `answer`", "input_key")),
    Case("a number as prompt", lines(GOOD | {"prompt": 7}), ("{path}:1: key `prompt`", "int")),
    Case("a list as response", lines(GOOD | {"response": ["x"]}), ("{path}:1: key `response`", "string", "list")),
    Case("half a surrogate pair", lines('{"prompt": "a", "response": "\\ud800"}'), ("{path}:1: key `response`: half",)),
    Case("messages no list", lines({"messages": "hi"}), ("{path}:1: key `messages`", "list of messages, got str")),
    Case("messages empty", lines({"messages": []}), ("{path}:1: key `messages`", "an empty list")),
    Case("unknown role", lines(turns(("human", "a"), BOT)), ("{path}:1: key `messages[0].role`", "'human'", "user")),
    Case("content no string", lines(turns(("user", {"x": 1}), BOT)), ("{path}:1: key `messages[0].content`", "dict")),
    Case(
        "content missing", lines(turns(USER, ("assistant", None))), ("{path}:1: key `messages[1].content`: is missing",)
    ),
    Case("a message no object", lines({"messages": ["hi"]}), ("{path}:1: key `messages[0]`", "`role` and `content`")),
    Case("assistant first", lines(turns(BOT, USER, BOT)), ("{path}:1: key `messages`: starts with an assistant turn",)),
    Case("no assistant turn", lines(turns(USER)), ("{path}:1: key `messages`: no assistant turn",)),
    Case(
        "ends with the user", lines(turns(USER, BOT, USER)), ("{path}:1: key `messages`: ends with a turn of 'user'",)
    ),
    Case("every answer empty", lines(turns(USER, ("assistant", ""))), ("{path}:1: key `messages`: every assistant",)),
    Case("messages and another prompt", lines(turns(USER, BOT) | {"prompt": "other"}), ("{path}:1: `prompt` is not",)),
    Case("messages and a response", lines(turns(USER, BOT) | GOOD), ("{path}:1: has both `messages` and `response`",)),
    Case(
        "two prompts",
        lines({"input": "a", "context_messages": [{"role": "user", "content": "b"}], "output": "c"}),
        ("{path}:1: columns `input`, `context_messages`", "keep one"),
    ),
    Case(
        "instruction and input",
        lines({"instruction": "sum up", "input": "text", "output": "c"}),
        ("{path}:1: columns `instruction` and `input`", "input_key"),
    ),
    Case("tools no list", lines(turns(USER, BOT) | {"tools": "f"}), ("{path}:1: key `tools`",)),
    Case("longer than the context", lines(GOOD, GOOD | {"response": "b" * 90}), ("{path}:2: ", "max_length is 64")),
    Case(
        "all rows dropped",
        lines(GOOD | {"response": "b" * 90}),
        ("{path}:1: all 1 rows", "longer than 64 tokens"),
        keys=("sft.truncation=drop",),
    ),
    Case(
        "input_key names no column",
        lines(GOOD),
        ("{path}:1: input_key names `nope`", "`prompt`, `response`"),
        keys=("sft.data=[{path: {path}, input_key: nope}]",),
    ),
    Case("weight zero", lines(GOOD), ("sft.data[0].weight", "> 0"), keys=("sft.data=[{path: {path}, weight: 0}]",)),
    Case("weight negative", lines(GOOD), ("sft.data[0].weight", "-1"), keys=("sft.data=[{path: {path}, weight: -1}]",)),
    Case(
        "weight not a number", lines(GOOD), ("sft.data[0].weight",), keys=("sft.data=[{path: {path}, weight: .nan}]",)
    ),
    Case("weight too small", lines(GOOD), ("weight",), keys=("sft.data=[{path: {path}, weight: 1.0e-9}]",)),
    Case(
        "unknown truncation", lines(GOOD), ("sft.truncation", "error, drop, left, right"), keys=("sft.truncation=cut",)
    ),
]

RANKINGS = [
    Case(
        "one response",
        lines(GOOD_RANKING | {"responses": ["a"], "scores": [1]}),
        ("{path}:1: key `responses`: expected at least 2",),
    ),
    Case(
        "scores too few", lines(GOOD_RANKING | {"scores": [1]}), ("{path}:1: key `scores`: 1 entries for 2 responses",)
    ),
    Case("a NaN score", lines(GOOD_RANKING | {"scores": [1, float("nan")]}), ("{path}:1: key `scores[1]`", "nan")),
    Case("a null score", lines(GOOD_RANKING | {"scores": [1, None]}), ("{path}:1: key `scores[1]`", "None")),
    Case("a boolean score", lines(GOOD_RANKING | {"scores": [True, 0]}), ("{path}:1: key `scores[0]`", "True")),
    Case("scores and ranks", lines(GOOD_RANKING | {"ranks": [1, 2]}), ("{path}:1: has both `scores` and `ranks`",)),
    Case(
        "ranks too many",
        lines({"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2, 3]}),
        ("{path}:1: key `ranks`: 3 entries",),
    ),
    Case(
        "rank zero",
        lines({"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1]}),
        ("{path}:1: key `ranks[0]`", "1 (best)"),
    ),
    Case(
        "neither scores nor ranks",
        lines({"prompt": "p", "responses": ["a", "b"]}),
        ("{path}:1: columns found", "`scores` or `ranks`"),
    ),
    Case(
        "chosen is rejected",
        lines({"prompt": "p", "chosen": "a", "rejected": "a"}),
        ("{path}:1: `chosen` and `rejected` are the same",),
    ),
    Case("no rejected", lines({"prompt": "p", "chosen": "a"}), ("{path}:1: columns found", "`chosen` and `rejected`")),
    Case(
        "chosen of messages, rejected of text",
        lines({"prompt": "p", "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"}),
        ("{path}:1: key `chosen`", "`rejected` is no list"),
    ),
    Case(
        "conversations of two prompts",
        lines({"chosen": turns(USER, BOT)["messages"], "rejected": turns(("user", "x"), BOT)["messages"]}),
        ("{path}:1: `chosen` and `rejected` share no first message",),
    ),
    Case(
        "responses and a pair",
        lines(GOOD_RANKING | {"chosen": "a", "rejected": "b"}),
        ("{path}:1: has `responses` and `chosen`",),
    ),
    Case(
        "a response no string", lines(GOOD_RANKING | {"responses": ["a", 2]}), ("{path}:1: key `responses[1]`", "int")
    ),
    Case(
        "sampled ids of another length",
        lines(GOOD_RANKING | {"response_ids": [[1]]}),
        ("{path}:1: key `response_ids`: 1 entries",),
    ),
    Case("a ranking too long", lines(GOOD_RANKING | {"prompt": "p" * 70}), ("{path}:1: ", "max_length is 64")),
]

PROMPTS = [
    Case(
        "no room for the answer",
        lines({"prompt": "a" * 60}),
        ("{path}:1: prompt of", "context 64 - max_new_tokens 8"),
        "ppo",
    ),
    Case(
        "every prompt dropped",
        lines({"prompt": "a" * 60}),
        ("{path}:1: all 1 rows", "longer than 56"),
        "ppo",
        ("ppo.truncation=drop",),
    ),
    Case("prompts of a CSV", text("prompt\na\n", "bad.csv"), ("{path}: .csv is not read",), "generate"),
    Case(
        "a prompt of the assistant",
        lines({"prompt": [{"role": "assistant", "content": "a"}]}),
        ("{path}:1: key `prompt`", "assistant turn"),
        "sample",
        (SHORT,),
    ),
    Case(
        "a prompt of the system",
        lines({"prompt": [{"role": "system", "content": "a"}]}),
        ("{path}:1: key `prompt`: holds only a system",),
        "sample",
        (SHORT,),
    ),
    Case("a bad line far down", lines(*[{"prompt": "a"}] * 600, "{"), ("{path}:601: not JSON",), "sample", (SHORT,)),
    Case(
        "a stop token beyond the vocabulary",
        lines({"prompt": "a"}),
        ("sampling.stop_token_ids names token 4096",),
        "sample",
        (SHORT, "sample.sampling.stop_token_ids=[4096]"),
    ),
    Case(
        "a stop token below 0",
        lines({"prompt": "a"}),
        ("sampling.stop_token_ids", "-1"),
        "ppo",
        ("ppo.sampling.stop_token_ids=[-1]",),
    ),
]

TOKENIZERS = [
    Case("no EOS", checkpoint(eos_token=None), ("model: no EOS token is defined", "tokenizer_config.json")),
    Case("no tokenizer", no_tokenizer, ("model: the tokenizer cannot be loaded", "tokenizer.json")),
    Case("a broken tokenizer", broken("tokenizer.json", "{"), ("model: the tokenizer cannot be loaded",)),
    Case(
        "a broken generation config",
        broken("generation_config.json", "{"),
        ("generation_config.json: cannot be read as JSON",),
    ),
    Case(
        "EOS of text in the generation config",
        broken("generation_config.json", '{"eos_token_id": "</s>"}'),
        ("generation_config.json: expected token ids", "</s>"),
    ),
    Case(
        "messages without a template",
        checkpoint((turns(USER, BOT),), chat_template=None),
        ("{path}:1:", "`messages`", "chat template"),
    ),
    Case(
        "a template with a syntax error",
        checkpoint(chat_template="{% for m in messages %}"),
        ("{path}:1: the chat template", "TemplateSyntaxError"),
    ),
    Case(
        "a template that refuses",
        checkpoint(chat_template="{{ raise_exception('no') }}"),
        ("{path}:1: the chat template refuses", "no"),
    ),
    Case(
        "a template that breaks on a role",
        checkpoint((turns(("system", "s"), USER, BOT),), chat_template=NO_SYSTEM + START),
        ("{path}:1: the chat template refuses turns of system, user", "ZeroDivisionError"),
    ),
    Case(
        "a template that is not prefix-stable",
        checkpoint((SEVERAL,), chat_template=ONLY_LAST + START),
        ("{path}:1: the chat template is not prefix-stable", "token"),
    ),
    Case(
        "a template that counts turns first",
        checkpoint((SEVERAL,), chat_template="{{ messages | length }}" + LOOP + START),
        ("{path}:1: the chat template is not prefix-stable", "token 0"),
    ),
    Case(
        "a mask of zeros",
        checkpoint((SEVERAL,), chat_template=NO_MARKS + START),
        ("{path}:1: the chat template's {% generation %} marks tokens of 0 of 2",),
    ),
    Case(
        "a mask of zeros on one answer",
        checkpoint(chat_template=NO_MARKS + START),
        ("{path}:1: the chat template's {% generation %} marks tokens of 0 of 1",),
    ),
    Case(
        "a template without answers",
        checkpoint(chat_template=ONLY_USER),
        ("{path}:1: the chat template renders nothing of the answer",),
    ),
    Case(
        "a template that renders nothing",
        checkpoint(chat_template="{% for m in messages %}{% endfor %}"),
        ("{path}:1: key `prompt`: the prompt has no tokens",),
    ),
]

PREVIEWS = [
    Case("preview of a bad line", lines("{"), ("{path}:1: not JSON",), "preview"),
    Case("preview of no rows", lines(GOOD), ("--rows", "1 or more"), "preview", ("--rows", "0")),
    Case("preview of an unknown kind", lines(GOOD), ("--kind", "'x'"), "preview", ("--kind", "x")),
    Case("preview with an unknown option", lines(GOOD), ("--colour", "icegrt data --help"), "preview", ("--colour",)),
    Case("preview beyond a length", lines(GOOD), ("{path}:1: ", "max_length is 3"), "preview", ("--max-length", "3")),
]


def ids(cases):
    return [case.name for case in cases]


@pytest.mark.parametrize("case", FILES, ids=ids(FILES))
def test_files_that_cannot_be_read(case, home, tmp_path, capsys):
    check_case_refused(case, home, tmp_path, capsys)


@pytest.mark.parametrize("case", ROWS, ids=ids(ROWS))
def test_rows_that_cannot_be_learned_from(case, home, tmp_path, capsys):
    check_case_refused(case, home, tmp_path, capsys)


@pytest.mark.parametrize("case", RANKINGS, ids=ids(RANKINGS))
def test_rankings_that_cannot_be(case, home, tmp_path, capsys):
    check_case_refused(Case(case.name, case.make, case.words, "reward", case.keys), home, tmp_path, capsys)


@pytest.mark.parametrize("case", PROMPTS, ids=ids(PROMPTS))
def test_prompts_that_cannot_be_answered(case, home, tmp_path, capsys):
    check_case_refused(case, home, tmp_path, capsys)


@pytest.mark.parametrize("case", TOKENIZERS, ids=ids(TOKENIZERS))
def test_tokenizers_and_templates_that_cannot_be_used(case, home, tmp_path, capsys):
    check_case_refused(case, home, tmp_path, capsys)


@pytest.mark.parametrize("case", PREVIEWS, ids=ids(PREVIEWS))
def test_previews_that_cannot_be_shown(case, home, tmp_path, capsys):
    check_case_refused(case, home, tmp_path, capsys)
