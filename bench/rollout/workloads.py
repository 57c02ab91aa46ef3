"""Models of random weights, and requests whose answers have given lengths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES = {
    "4x256": {
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
    },
    "135M": {
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49_152,
    },
}


@dataclass(frozen=True)
class Workload:
    """Prompts with the length of each answer.

    Attributes:
        name: of the case.
        prompts: token ids.
        lengths: tokens of the answer to each prompt.
        samples: answers per prompt.
    """

    name: str
    prompts: list[list[int]]
    lengths: list[int]
    samples: int = 1

    @property
    def n_tokens(self) -> int:
        """Sampled tokens in all."""
        return sum(self.lengths) * self.samples


def random_model(shape: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """Return a Llama with random weights and no end-of-sequence token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval().to(dtype)


def workloads(scale: int) -> list[Workload]:
    """Return the long tail, equal lengths, and prompts with 8 samples. scale: divides the numbers of prompts."""
    rng = np.random.default_rng(0)
    count = 128 // scale

    def prompts(shortest: int, longest: int, number: int) -> list[list[int]]:
        sizes = rng.integers(shortest, longest + 1, number)
        return [rng.integers(2, 4000, int(size)).tolist() for size in sizes]

    tail = np.minimum(rng.geometric(1 / 64, count), 256).tolist()
    shared = max(1, 8 // scale)
    return [
        Workload("long tail", prompts(16, 64, count), tail),
        Workload("uniform", prompts(16, 64, count), [64] * count),
        Workload("8 samples of 512", prompts(512, 512, shared), [64] * shared, 8),
    ]
