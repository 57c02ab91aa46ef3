"""Byte-level tokenizers, chat templates and rows of the data tests."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from icegrt.data import Row

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


def make_tokenizer(template=None, bos=False, merges=(), **special):
    """Return a tokenizer of bytes and ChatML markers. merges: pairs of characters that become one token."""
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
    """Return the trained tokens as text, with a bar between two that are not adjacent."""
    mask = example.action_mask or [True] * len(example.response)
    pieces, last = [], -1
    for i in (i for i, flag in enumerate(mask) if flag):
        if i != last + 1 or not pieces:
            pieces.append([])
        pieces[-1].append(example.response[i])
        last = i
    return "|".join(text(tokenizer, piece) for piece in pieces)
