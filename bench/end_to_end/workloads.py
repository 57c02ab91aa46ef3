"""Workloads of whole PPO iterations: models of random weights, prompts, and how answers end.

Models are near uniform over the vocabulary, so an answer ends after a geometric number of tokens if a share of the
vocabulary are stop tokens. This module imports neither icegrt nor Megatron: peers read it, too.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

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

    def prompt_ids(self) -> list[list[int]]:
        """Return the prompts of an iteration; they hold no stop token."""
        draw, first = random.Random(0), FIRST_WORD + self.stop_tokens
        return [
            [draw.randrange(first, self.vocab) for _ in range(draw.randint(*self.prompt_tokens))]
            for _ in range(self.prompts)
        ]

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
        Workload("long-tail", prompts=128, answer_tokens=256, stop_tokens=64),
        Workload("8-samples", prompts=8, samples=8, prompt_tokens=(512, 512)),
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
# What TRL, icegrt and the reference path share. KL in the reward (k1), GAE, one pass of one minibatch.
RECIPE = {"kl_coef": 0.05, "gamma": 1.0, "lam": 0.95, "clip": 0.2, "value_clip": 0.2, "lr": 1e-5}
