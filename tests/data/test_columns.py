"""Columns as TRL, verl and OpenRLHF name them, and preferences as strings and as conversations."""

import pytest

from icegrt.errors import DataError
from tests.helpers.data_rows import CHAT, PLAIN, make, row, text, trained
from tests.helpers.encoding import encode_example, encode_prompts, encode_ranking

ASK, CALL = CHAT[1], CHAT[2]
OTHER = {"role": "assistant", "content": "no"}


@pytest.fixture(scope="module")
def chat():
    return make(PLAIN)


@pytest.mark.parametrize(
    "data",
    [
        dict(prompt="ask", completion="call"),  # TRL
        dict(prompt=[ASK], completion=[CALL]),  # TRL, conversations
        dict(input="ask", output="call"),  # OpenRLHF
        dict(context_messages=[ASK], output="call"),  # OpenRLHF
        dict(messages=[ASK, CALL]),  # all three
        dict(prompt="ask", input="an extra column", response="call"),
    ],
)
def test_supervised_rows_of_the_field(chat, data):
    example = encode_example(chat, row(**data), 100)
    assert text(chat, example.prompt) == "<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\n"
    assert trained(chat, example) == "call<|im_end|>"


def test_prompts_of_the_field_keep_their_columns(chat):
    verl = dict(
        data_source="gsm8k",
        prompt=[ASK],
        ability="math",
        reward_model={"style": "rule", "ground_truth": "4"},
        extra_info={"index": 3},
    )
    rows = [row(**verl), row(input="ask", label="4"), row(context_messages=[ASK], label="4"), row(prompt="ask")]
    prompts = encode_prompts(chat, rows, 100)
    assert len({tuple(prompt.tokens) for prompt in prompts}) == 1
    assert prompts[0].row == verl
    assert prompts[1].row == {"input": "ask", "label": "4", "prompt": "ask"}
    assert prompts[2].row["prompt"] == [ASK]


def test_an_answer_of_several_turns_is_masked_as_messages_are(chat):
    example = encode_example(chat, row(prompt=[ASK], completion=CHAT[2:]), 200)
    assert trained(chat, example) == "call<|im_end|>|answer<|im_end|>"


@pytest.mark.parametrize(
    "data",
    [
        dict(prompt="ask", chosen="call", rejected="no"),
        dict(prompt=[ASK], chosen=[CALL], rejected=[OTHER]),
        dict(chosen=[ASK, CALL], rejected=[ASK, OTHER]),
        dict(prompt="ask", chosen=[ASK, CALL], rejected=[ASK, OTHER]),
        dict(prompt=[ASK], chosen=[ASK, CALL], rejected=[ASK, OTHER]),
        dict(input="ask", chosen="call", rejected="no"),
    ],
)
def test_preferences_of_the_field(chat, data):
    ranking = encode_ranking(chat, row(**data), 100)
    assert text(chat, ranking.prompt) == "<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\n"
    assert [text(chat, r) for r in ranking.responses] == ["call<|im_end|>", "no<|im_end|>"]
    assert ranking.scores == [1.0, 0.0]


def test_a_preference_whose_prompt_is_another_is_refused(chat):
    with pytest.raises(DataError, match=r"file.jsonl:12: `prompt` is not how the row's messages begin"):
        encode_ranking(chat, row(prompt="else", chosen=[ASK, CALL], rejected=[ASK, OTHER]), 100)


def test_fields_that_a_table_adds_as_nulls_do_not_reach_the_template():
    tokenizer = make(PLAIN.replace("{{ m.role }}", "{% if m.tool_calls is defined %}CALLS{% endif %}{{ m.role }}"))
    messages = [message | {"tool_calls": None, "name": None} for message in (ASK, CALL)]
    example = encode_example(tokenizer, row(messages=messages), 100)
    assert "CALLS" not in text(tokenizer, example.prompt + example.response)
