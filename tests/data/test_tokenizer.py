"""Checks of the tokenizer and the tokens that end an answer."""

import errno

import pytest

from icegrt.data import ExampleEncoder, RankingEncoder, check_tokenizer, load_tokenizer, stop_ids
from icegrt.data.tokenizer import save_tokenizer
from icegrt.errors import CheckpointError
from tests.helpers.data_rows import (
    PLAIN,
    make_tokenizer,
    row,
    text,
)


def test_checks_of_the_tokenizer(tmp_path):
    messages = []
    make_tokenizer(PLAIN).save_pretrained(tmp_path / "good")
    assert load_tokenizer(tmp_path / "good", messages.append).chat_template == PLAIN
    assert messages == []
    check_tokenizer(make_tokenizer(pad_token="<|im_end|>"), print_info=messages.append)
    check_tokenizer(make_tokenizer(pad_token=None), "model", print_info=messages.append)
    assert "pad token and EOS are both '<|im_end|>'" in messages[0]
    assert messages[1].startswith("model: no pad token")
    with pytest.warns(UserWarning, match="no pad token"):
        check_tokenizer(make_tokenizer(pad_token=None))


def test_refusals_of_the_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match="no EOS token is defined; set `eos_token`"):
        check_tokenizer(make_tokenizer(eos_token=None))
    with pytest.raises(CheckpointError, match="no such folder"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_stop_ids_are_the_union_of_all_that_name_one(tmp_path):
    tokenizer = make_tokenizer()
    eos = tokenizer.eos_token_id
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    assert stop_ids(tokenizer) == [eos]
    assert stop_ids(tokenizer, {"eos_token_id": 3}, tmp_path, [7, eos]) == [3, 5, 7, eos]
    assert stop_ids(make_tokenizer(eos_token=None), {"eos_token_id": None}, tmp_path / "absent") == []


@pytest.mark.parametrize("value", ["[true]", '"</s>"', "[-1]", "[[2]]"])
def test_stop_ids_that_are_none(tmp_path, value):
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
    with pytest.raises(CheckpointError, match=r"generation_config.json: expected token ids"):
        stop_ids(make_tokenizer(), None, tmp_path)


def test_a_turn_ends_at_whatever_token_ends_an_answer():
    tokenizer = make_tokenizer(
        PLAIN, eos_token="<bos>"
    )  # the template ends turns with <|im_end|>, which is not EOS here
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (example,) = ExampleEncoder(tokenizer, 100, stop_ids=[turn_end])([row(prompt="a", response="b")])
    assert text(tokenizer, example.response) == "b<|im_end|>"
    (encoded,) = ExampleEncoder(tokenizer, 100)([row(prompt="a", response="b")])
    assert text(tokenizer, encoded.response) == "b<|im_end|>\n<bos>"
    (ranking,) = RankingEncoder(tokenizer, 100, stop_ids=[turn_end])([row(prompt="a", chosen="b", rejected="c")])
    assert [text(tokenizer, r) for r in ranking.responses] == ["b<|im_end|>", "c<|im_end|>"]


def test_a_full_disk_is_the_systems_error(tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            raise Exception("No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left") as error_info:
        save_tokenizer(Tokenizer(), tmp_path)
    assert (error_info.value.errno, error_info.value.filename) == (errno.ENOSPC, str(tmp_path))
