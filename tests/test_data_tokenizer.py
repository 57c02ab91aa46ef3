"""Checks of the tokenizer and the tokens that end an answer; and the tiny tokenizers that other tests share."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from icegrt.data import ExampleEncoder, RankingEncoder, Row, check_tokenizer, load_tokenizer, stop_ids
from icegrt.errors import CheckpointError

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
END = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = "{% for m in messages %}" + TURN + END
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n" + END
)
MARKS_NOTHING = MARKED.replace("{{ m.content }}{% endgeneration %}", "{% endgeneration %}{{ m.content }}")
FORGETFUL = "{% for m in messages %}{% if loop.last or m.role == 'user' %}" + TURN + "{% endif %}" + END
NO_EOS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"  # noqa: E501
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + PLAIN
WITH_TOOLS = "{% if tools %}TOOLS{{ tools[0].name }}\n{% endif %}" + PLAIN
CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "ask"},
    {"role": "assistant", "content": "call"},
    {"role": "tool", "content": "result"},
    {"role": "assistant", "content": "answer"},
]


def make(template=None, bos=False, merges=(), **special):
    """Bytes as tokens, with the ChatML markers (and `merges`, pairs of characters that become one token)."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for a, b in merges:
        vocab[a + b] = len(vocab)
    core = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>", "<pad>", "<bos>"])
    if bos:
        ends = [("<bos>", core.token_to_id("<bos>")), ("<|im_end|>", core.token_to_id("<|im_end|>"))]
        core.post_processor = processors.TemplateProcessing(single="<bos> $A <|im_end|>", special_tokens=ends)
    special = {"eos_token": "<|im_end|>", "pad_token": "<pad>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **special)


def row(**data):
    return Row(data, "file.jsonl:12")


def text(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


def trained(tokenizer, example):
    """The trained tokens as text, a bar where tokens in between are not trained."""
    mask = example.action_mask or [True] * len(example.response)
    pieces, last = [], -1
    for i in (i for i, flag in enumerate(mask) if flag):
        if i != last + 1 or not pieces:
            pieces.append([])
        pieces[-1].append(example.response[i])
        last = i
    return "|".join(text(tokenizer, piece) for piece in pieces)


def test_checks_of_the_tokenizer(tmp_path):
    said = []
    make(PLAIN).save_pretrained(tmp_path / "good")
    assert load_tokenizer(tmp_path / "good", said.append).chat_template == PLAIN
    assert said == []
    check_tokenizer(make(pad_token="<|im_end|>"), say=said.append)
    check_tokenizer(make(pad_token=None), "model", say=said.append)
    assert "pad token and EOS are both '<|im_end|>'" in said[0]
    assert said[1].startswith("model: no pad token")
    with pytest.warns(UserWarning, match="no pad token"):
        check_tokenizer(make(pad_token=None))


def test_refusals_of_the_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match="no EOS token is defined; set `eos_token`"):
        check_tokenizer(make(eos_token=None))
    with pytest.raises(CheckpointError, match="no such folder"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_stop_ids_are_the_union_of_all_that_name_one(tmp_path):
    tokenizer = make()
    eos = tokenizer.eos_token_id
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    assert stop_ids(tokenizer) == [eos]
    assert stop_ids(tokenizer, {"eos_token_id": 3}, tmp_path, [7, eos]) == [3, 5, 7, eos]
    assert stop_ids(make(eos_token=None), {"eos_token_id": None}, tmp_path / "absent") == []


@pytest.mark.parametrize("value", ["[true]", '"</s>"', "[-1]", "[[2]]"])
def test_stop_ids_that_are_none(tmp_path, value):
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
    with pytest.raises(CheckpointError, match=r"generation_config.json: expected token ids"):
        stop_ids(make(), None, tmp_path)


def test_a_turn_ends_at_whatever_token_ends_an_answer():
    tokenizer = make(PLAIN, eos_token="<bos>")  # the template ends turns with <|im_end|>, which is not EOS here
    turn_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (example,) = ExampleEncoder(tokenizer, 100, stop_ids=[turn_end])([row(prompt="a", response="b")])
    assert text(tokenizer, example.response) == "b<|im_end|>"
    (alone,) = ExampleEncoder(tokenizer, 100)([row(prompt="a", response="b")])
    assert text(tokenizer, alone.response) == "b<|im_end|>\n<bos>"
    (ranking,) = RankingEncoder(tokenizer, 100, stop_ids=[turn_end])([row(prompt="a", chosen="b", rejected="c")])
    assert [text(tokenizer, r) for r in ranking.responses] == ["b<|im_end|>", "c<|im_end|>"]
