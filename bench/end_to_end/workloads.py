"""Workloads of whole PPO iterations: models of random weights, prompts, and how answers end.

Models are near uniform over the vocabulary, so an answer ends after a geometric number of tokens if a share of the
vocabulary are stop tokens. This module imports neither icegrt nor Megatron: peers read it, too.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass, fields, replace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

PAD, EOS, FIRST_WORD = 0, 1, 2


@dataclass(frozen=True)
class Workload:
    """One PPO iteration's work.

    Attributes:
        name: of the rows.
        layers, width, mlp, heads, kv_heads, vocab: of the Llama that all four roles are.
        prompts: prompts of an iteration.
        samples: answers per prompt.
        prompt_tokens: shortest and longest prompt.
        answer_tokens: longest answer.
        stop_tokens: tokens that end an answer, besides EOS.
        tied: the LM head is the embedding.
    """

    name: str
    layers: int = 4
    width: int = 256
    mlp: int = 688
    heads: int = 4
    kv_heads: int = 4
    vocab: int = 4096
    prompts: int = 64
    samples: int = 1
    prompt_tokens: tuple[int, int] = (16, 64)
    answer_tokens: int = 64
    stop_tokens: int = 0
    tied: bool = False

    @property
    def episodes(self) -> int:
        """Answers of an iteration."""
        return self.prompts * self.samples

    @property
    def stop_ids(self) -> list[int]:
        """Token ids that end an answer."""
        return [EOS, *range(FIRST_WORD, FIRST_WORD + self.stop_tokens)]

    @property
    def context(self) -> int:
        """Longest sequence."""
        return self.prompt_tokens[1] + self.answer_tokens

    @property
    def summary(self) -> str:
        """Its sizes in one line."""
        shortest, longest = self.prompt_tokens
        prompt = f"{shortest}" if shortest == longest else f"{shortest} to {longest}"
        return (
            f"{self.layers} layers of {self.width}, vocabulary {self.vocab}, {self.prompts} prompts of {prompt} "
            f"tokens, {self.samples} answers each of up to {self.answer_tokens} tokens"
        )

    def prompt_ids(self) -> list[list[int]]:
        """Return the prompts of an iteration; they hold no stop token."""
        draw, first = random.Random(0), FIRST_WORD + self.stop_tokens
        return [
            [draw.randrange(first, self.vocab) for _ in range(draw.randint(*self.prompt_tokens))]
            for _ in range(self.prompts)
        ]

    def prompt_texts(self) -> list[str]:
        """Return the prompts as texts of `tokenizer`."""
        return [" ".join(f"w{i}" for i in ids) for ids in self.prompt_ids()]

    def config(self, **changes: object) -> LlamaConfig:
        """Return the configuration of the models."""
        return LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.width,
            intermediate_size=self.mlp,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            max_position_embeddings=self.context,
            pad_token_id=PAD,
            eos_token_id=EOS,
            bos_token_id=None,
            tie_word_embeddings=self.tied,
            **changes,
        )

    def actor(self) -> LlamaForCausalLM:
        """Return the actor as it starts, in fp32; the reference has the same weights."""
        torch.manual_seed(0)
        return LlamaForCausalLM(self.config()).eval()

    def reward_model(self) -> LlamaForSequenceClassification:
        """Return the reward model, in fp32; the critic starts from the same weights."""
        torch.manual_seed(1)
        return LlamaForSequenceClassification(self.config(num_labels=1)).eval()


WORKLOADS = {
    w.name: w
    for w in (
        Workload("uniform"),
        Workload("long-tail", prompts=32, answer_tokens=256, stop_tokens=64),
        Workload("8-samples", prompts=2, samples=8, prompt_tokens=(512, 512)),
        Workload(
            "135M",
            layers=30,
            width=576,
            mlp=1536,
            heads=9,
            kv_heads=3,
            vocab=49_152,
            tied=True,
            prompts=16,
            samples=2,
            prompt_tokens=(32, 64),
            answer_tokens=32,
        ),
    )
}


def tokenizer(workload: Workload, **options: object) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per word, `w2`, `w3` and so on, with the workload's pad and EOS tokens."""
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(FIRST_WORD, workload.vocab))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", **options)


def workload_of(text: str) -> Workload:
    """Return a workload by name, with other sizes if the text names any: "135M,prompts=2,prompt_tokens=4:8".

    Raises:
        ValueError: No workload or size has that name.
    """
    name, *changes = text.split(",")
    if name not in WORKLOADS:
        raise ValueError(f"{name!r} is no workload; there are {', '.join(WORKLOADS)}")
    sizes = {field.name for field in fields(Workload)} - {"name", "tied"}
    values: dict[str, int | tuple[int, ...]] = {}
    for change in changes:
        key, _, value = change.partition("=")
        if key not in sizes:
            raise ValueError(f"{key!r} is no size of a workload; there are {', '.join(sorted(sizes))}")
        numbers = tuple(map(int, value.split(":")))
        values[key] = numbers if key == "prompt_tokens" else numbers[0]
    return replace(WORKLOADS[name], name=text, **values)


def worker_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a worker's arguments: `workload`, and `dtype` of the computation."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("workload", type=workload_of)
    parser.add_argument("dtype", choices=("fp32", "bf16"))
    return parser


# What TRL, icegrt and the reference path share. KL in the reward (k1), GAE, one pass of one minibatch.
RECIPE = {"kl_coef": 0.05, "gamma": 1.0, "lam": 0.95, "clip": 0.2, "value_clip": 0.2, "lr": 1e-5}
