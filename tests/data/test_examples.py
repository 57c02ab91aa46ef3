"""Tokens: prompt and response told apart, EOS kept, masks of several turns, lengths, and every refusal."""

import pytest

from icegrt.data import EncodedDataset, ExampleEncoder, report_lengths
from icegrt.errors import DataError
from tests.helpers.data_rows import (
    CHAT,
    FORGETFUL,
    MARKED,
    MARKS_NOTHING,
    NO_EOS,
    PLAIN,
    STRICT,
    WITH_TOOLS,
    make,
    row,
    text,
    trained,
)
from tests.helpers.encoding import encode_example, encode_examples, encode_prompt, encode_prompts, read_rows


@pytest.fixture(scope="module")
def plain():
    return make()


@pytest.fixture(scope="module")
def chat():
    return make(PLAIN)


# Supervised rows.


def test_without_a_template(plain):
    example = encode_example(plain, row(prompt="ask: ", response="yes é"), 100)
    assert text(plain, example.prompt) == "ask: "
    assert text(plain, example.response) == "yes é<|im_end|>"
    assert example.action_mask is None
    assert (example.where, example.row["response"]) == ("file.jsonl:12", "yes é")
    assert len(example) == len(example.prompt) + len(example.response)


def test_bos_stays_and_an_eos_after_the_prompt_goes():
    tokenizer = make(bos=True)
    example = encode_example(tokenizer, row(prompt="a", response="b"), 100)
    assert text(tokenizer, example.prompt + example.response) == "<bos>ab<|im_end|>"


def test_eos_is_not_doubled(plain, chat):
    for tokenizer in (plain, chat):
        for response in ("b", "b<|im_end|>"):
            example = encode_example(tokenizer, row(prompt="a", response=response), 100)
            assert example.response[-1] == tokenizer.eos_token_id
        assert (
            encode_example(plain, row(prompt="a", response="b<|im_end|>"), 100).response.count(plain.eos_token_id) == 1
        )


def test_with_a_template_the_prompt_is_what_sampling_renders(chat):
    example = encode_example(chat, row(prompt="ask", response="yes"), 100)
    assert text(chat, example.prompt) == "<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\n"
    assert text(chat, example.response) == "yes<|im_end|>"  # the template's newline after EOS is never sampled
    assert example.prompt == encode_prompt(chat, row(prompt="ask"), 100)


def test_pad_equal_to_eos_keeps_eos():
    tokenizer = make(PLAIN, pad_token="<|im_end|>")
    example = encode_example(tokenizer, row(prompt="ask", response="yes"), 100)
    assert example.response[-1] == tokenizer.eos_token_id
    assert example.action_mask is None


def test_eos_is_appended_where_the_template_writes_none():
    tokenizer = make(NO_EOS)
    example = encode_example(tokenizer, row(prompt="ask", response="yes"), 100)
    assert text(tokenizer, example.prompt) == "[user]ask\n[assistant]"
    assert text(tokenizer, example.response) == "yes\n<|im_end|>"
    example = encode_example(tokenizer, row(messages=CHAT), 200)
    assert trained(tokenizer, example) == "call\n|answer\n<|im_end|>"


@pytest.mark.parametrize("template", [PLAIN, MARKED, MARKED.replace("{% endgeneration %}{% else %}", "<|im_end|>\n{% endgeneration %}{% else %}").replace("{% endif %}<|im_end|>\n", "<|im_end|>\n{% endif %}")])  # fmt: skip # noqa: E501
def test_every_assistant_turn_is_trained_with_its_eos(template):
    tokenizer = make(template)
    example = encode_example(tokenizer, row(messages=CHAT), 200)
    assert text(tokenizer, example.prompt).endswith("ask<|im_end|>\n<|im_start|>assistant\n")
    assert trained(tokenizer, example) == "call<|im_end|>|answer<|im_end|>"
    assert len(example.action_mask) == len(example.response)
    assert text(tokenizer, example.response) == (
        "call<|im_end|>\n<|im_start|>tool\nresult<|im_end|>\n<|im_start|>assistant\nanswer<|im_end|>"
    )


def test_a_prompt_of_messages_trains_the_response_only(chat):
    history = [*CHAT, {"role": "user", "content": "more"}]
    example = encode_example(chat, row(prompt=history, response="yes"), 200)
    assert trained(chat, example) == "yes<|im_end|>"
    assert "answer" in text(chat, example.prompt)


def test_a_row_of_messages_and_something_else_must_agree(chat):
    talk = CHAT[1:3]
    for prompt in ("ask", talk[:1], talk):  # the first question beside the conversation, as many data sets have it
        assert trained(chat, encode_example(chat, row(messages=talk, prompt=prompt), 100)) == "call<|im_end|>"
    with pytest.raises(DataError, match=r"file.jsonl:12: `prompt` is not how the row's messages begin"):
        encode_example(chat, row(messages=talk, prompt="other"), 100)
    with pytest.raises(DataError, match="has both `messages` and `response`"):
        encode_example(chat, row(messages=talk, prompt="ask", response="other"), 100)
    with pytest.raises(DataError, match="`prompt` is not how the row's messages begin"):
        encode_prompt(chat, row(messages=talk, prompt="other"), 100)


def test_tools_and_calls_without_content_reach_the_template():
    tokenizer = make(WITH_TOOLS)
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    example = encode_example(tokenizer, row(messages=[CHAT[1], call, *CHAT[3:]], tools=[{"name": "f"}]), 200)
    assert text(tokenizer, example.prompt).startswith("TOOLSf\n")
    assert trained(tokenizer, example) == "<|im_end|>|answer<|im_end|>"


def test_a_template_that_is_not_prefix_stable_is_refused():
    tokenizer = make(FORGETFUL)
    assert trained(tokenizer, encode_example(tokenizer, row(messages=CHAT[1:3]), 100)) == "call<|im_end|>"
    with pytest.raises(
        DataError, match=r"file.jsonl:12: the chat template is not prefix-stable: the prompt alone has 22"
    ):
        encode_example(tokenizer, row(messages=[*CHAT[1:3], CHAT[1], CHAT[4]]), 100)


def test_a_template_that_shortens_earlier_answers_needs_marks():
    shorten = ("{{ m.content }}", "{{ m.content if loop.last or m.role != 'assistant' else m.content[:2] }}")
    with pytest.raises(DataError, match="prefix-stable: the conversation through turn 2 alone"):
        encode_example(make(PLAIN.replace(*shorten)), row(messages=CHAT), 200)
    tokenizer = make(MARKED.replace(*shorten))
    example = encode_example(tokenizer, row(messages=CHAT), 200)
    assert trained(tokenizer, example) == "ca<|im_end|>|answer<|im_end|>"


def test_a_merge_across_the_generation_prompt_is_refused():
    tokenizer = make(NO_EOS, merges=[("]", "y")])
    assert encode_example(tokenizer, row(prompt="ask", response="no"), 100)
    with pytest.raises(DataError, match=r"prefix-stable: the prompt alone .* at token 20 \('\]' becomes '\]yes"):
        encode_example(tokenizer, row(prompt="ask", response="yes"), 100)


def test_marks_decide_on_one_answer_too():
    part = MARKED.replace("{% generation %}{{ m.content }}", "{{ m.content[:2] }}{% generation %}{{ m.content[2:] }}")
    tokenizer = make(part)
    assert trained(tokenizer, encode_example(tokenizer, row(prompt="ask", response="yes"), 100)) == "s<|im_end|>"


def test_a_template_that_renders_no_answer_is_refused():
    silent = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(DataError, match=r"file.jsonl:12: the chat template renders nothing of the answer"):
        encode_example(make(silent), row(prompt="ask", response="yes"), 100)


def test_an_empty_generation_mask_is_refused():
    with pytest.raises(DataError, match="marks tokens of 0 of 1 assistant turns"):
        encode_example(make(MARKS_NOTHING), row(prompt="ask", response="yes"), 100)
    with pytest.raises(DataError, match="marks tokens of 0 of 2 assistant turns"):
        encode_example(make(MARKS_NOTHING), row(messages=CHAT), 200)


def test_a_template_that_refuses_is_quoted():
    with pytest.raises(DataError, match=r"file.jsonl:12: the chat template refuses turns of system, .*no system turn"):
        encode_example(make(STRICT), row(messages=CHAT), 200)


BAD_EXAMPLES = [
    (dict(text="a", label=1, response=None), "columns found: `text`, `label`; expected `messages`, or `prompt` and"),
    (dict(), "columns found: none"),
    (dict(prompt="a"), "columns found: `prompt`"),
    (dict(prompt="", response="b"), "key `prompt`: is empty"),
    (dict(prompt="a", response="  "), "key `response`: is empty"),
    (dict(prompt=3, response="b"), "key `prompt`: expected a list of messages, got int"),
    (dict(prompt="a", response=["b"]), "key `response`: expected a string, got list"),
    (dict(prompt="a", response="\ud800"), "key `response`: half a surrogate pair"),
    (dict(messages="a"), "key `messages`: expected a list of messages, got str"),
    (dict(messages=[]), "key `messages`: expected a list of messages, got an empty list"),
    (dict(messages=["a"]), r"key `messages\[0\]`: expected an object with `role` and `content`, got str"),
    (dict(messages=[{"role": "human", "content": "a"}]), r"key `messages\[0\].role`: expected one of system, user"),
    (dict(messages=[{"role": "user"}]), r"key `messages\[0\].content`: is missing"),
    (dict(messages=[{"role": "user", "content": [1]}]), r"`messages\[0\].content`: expected a string, got list"),
    (dict(messages=CHAT[:2]), "key `messages`: no assistant turn to learn from; roles are system, user"),
    (dict(messages=CHAT[2:]), "key `messages`: starts with an assistant turn"),
    (dict(messages=CHAT[:4]), "key `messages`: ends with a turn of 'tool'"),
    (dict(messages=CHAT, tools="f"), "key `tools`: expected a list"),
]


@pytest.mark.parametrize(("data", "says"), BAD_EXAMPLES)
def test_bad_supervised_rows(chat, data, says):
    with pytest.raises(DataError, match=f"^file.jsonl:12: .*{says}"):
        encode_example(chat, row(**data), 200)


def test_messages_need_a_template(plain):
    with pytest.raises(DataError, match=r"file.jsonl:12: .*needs a chat template"):
        encode_example(plain, row(messages=CHAT), 200)


# Lengths.


def test_rows_beyond_the_longest(plain):
    rows = read_rows([{"prompt": "a" * n, "response": "b" * 4} for n in (2, 5, 9, 12)])
    with pytest.raises(DataError, match=r"^row 2: 14 tokens \(prompt 9, response 5\), but max_length is 10: shorten"):
        encode_examples(plain, rows, 10)
    kept = encode_examples(plain, rows, 10, truncation="drop")
    assert [example.where for example in kept] == ["row 0", "row 1"]
    cut = encode_examples(plain, rows, 10, truncation="right")
    assert [(e.where, text(plain, e.response), e.truncated) for e in cut] == [
        ("row 0", "bbbb<|im_end|>", False),
        ("row 1", "bbbb<|im_end|>", False),
        ("row 2", "b", True),
    ]
    left = encode_examples(plain, rows, 10, truncation="left")
    assert [(e.where, text(plain, e.prompt), text(plain, e.response), e.truncated) for e in left] == [
        ("row 0", "aa", "bbbb<|im_end|>", False),
        ("row 1", "aaaaa", "bbbb<|im_end|>", False),
        ("row 2", "aaaaa", "bbbb<|im_end|>", True),
        ("row 3", "aaaaa", "bbbb<|im_end|>", True),
    ]


def test_left_keeps_a_token_of_the_prompt(plain):
    rows = read_rows([{"prompt": "ab", "response": "c" * n} for n in (3, 4, 5)])  # and EOS
    assert [e.where for e in encode_examples(plain, rows, 5, truncation="left")] == ["row 0"]


def test_lengths_and_what_is_left_out_are_reported(plain, capsys):
    rows = read_rows([{"prompt": "a" * n, "response": "b" * 4} for n in (2, 5, 9, 12)])
    report_lengths([EncodedDataset(rows, ExampleEncoder(plain, 10, "right"), "ads.jsonl")])
    header, figures, why = capsys.readouterr().out.splitlines()
    assert header.split() == ["data", "rows", "tokens", "mean", "p95", "longest", "truncated", "dropped"]
    assert figures.split() == ["ads.jsonl", "3", "27", "9", "10", "10", "1", "1"]
    assert why == "ads.jsonl: dropped 1 longer than 10 tokens"


def test_truncation_keeps_masks_in_step(chat):
    whole = encode_example(chat, row(messages=CHAT), 200)
    for limit in range(len(whole.prompt) + 1, len(whole)):
        (example,) = encode_examples(chat, [row(messages=CHAT)], limit, truncation="right")
        assert len(example) == limit
        mask = example.action_mask or [True] * len(example.response)
        assert mask == whole.action_mask[: len(example.response)]


def test_nothing_left_and_wrong_options(plain):
    rows = [row(prompt="abc", response="d")]
    for truncation in ("drop", "right"):
        with pytest.raises(DataError, match=r"file.jsonl:12: all 1 rows from here on are dropped"):
            encode_examples(plain, rows, 3, truncation=truncation)
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        encode_examples(plain, rows, 0)
    with pytest.raises(ValueError, match="truncation must be one of error, drop, left, got 'right'"):
        encode_prompts(plain, rows, 9, truncation="right")


def test_many_rows_equal_one_by_one(chat):
    rows = read_rows([{"prompt": f"ask {i}", "response": f"yes {i}"} for i in range(1100)])
    together = encode_examples(chat, rows, 100)
    assert together[::97] == [encode_example(chat, r, 100) for r in rows[::97]]


# Prompts.


def test_prompts_of_each_shape(plain, chat):
    assert text(plain, encode_prompt(plain, row(prompt="ask"), 9)) == "ask"
    assert text(chat, encode_prompt(chat, row(prompt="ask", other=1), 99, chat=False)) == "ask"
    whole = encode_prompt(chat, row(messages=CHAT), 200)
    assert whole == encode_prompt(chat, row(messages=CHAT[:-1]), 200) == encode_prompt(chat, row(prompt=CHAT[:-1]), 200)
    assert text(chat, whole).endswith("result<|im_end|>\n<|im_start|>assistant\n")
    (prompt,) = encode_prompts(chat, [row(prompt="ask", other=1)], 99)
    assert (prompt.where, prompt.row["other"]) == ("file.jsonl:12", 1)
    assert len(prompt) == len(prompt.tokens)


def test_a_prompt_is_what_training_saw(chat):
    assert encode_example(chat, row(messages=CHAT[:3]), 200).prompt == encode_prompt(chat, row(messages=CHAT[:3]), 200)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (dict(text="a"), "columns found: `text`; expected `prompt`"),
        (dict(prompt=" \n"), "key `prompt`: is empty"),
        (dict(prompt=[]), "expected a list of messages, got an empty list"),
        (dict(prompt=CHAT), "key `prompt`: the prompt ends with an assistant turn"),
        (dict(messages=CHAT[2:3]), "key `messages`: holds only an assistant turn"),
    ],
)
def test_bad_prompts(chat, data, says):
    with pytest.raises(DataError, match=f"^file.jsonl:12: .*{says}"):
        encode_prompt(chat, row(**data), 200)


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(DataError, match="the prompt has no tokens"):
        encode_prompt(make("{% for m in messages %}{% endfor %}"), row(prompt="a"), 9)


def test_long_prompts(plain):
    rows = read_rows([{"prompt": "a" * 600}, {"prompt": "b"}])
    why = "context 512 - max_new_tokens 88 leaves 424"
    with pytest.raises(DataError, match=f"^row 0: prompt of 600 tokens, but {why}: shorten it, lower max_new_tokens"):
        encode_prompts(plain, rows, 424, limit_reason=why)
    assert [p.where for p in encode_prompts(plain, rows, 424, truncation="drop")] == ["row 1"]
