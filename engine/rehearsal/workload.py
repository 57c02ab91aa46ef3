"""The lengths of an iteration's prompts and responses, given or drawn from a distribution."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from icegrt.errors import ConfigError
from icegrt.rollout.types import Response

# Token ids. Those of different prompts differ, since equal ones are one; different ones give a real model different
# scores.
_TOKENS = 61
_DIGITS = 4


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths in tokens.

    Attributes:
        kind: "fixed", or "uniform" from `low` to `high`.
        low, high: tokens; equal if fixed.
    """

    kind: str
    low: int
    high: int

    @classmethod
    def parse(cls, text: str, option: str) -> Lengths:
        """Read "512" or "uniform:128:1024".

        Raises:
            ConfigError: names the option.
        """
        parts = text.split(":")
        numbers = parts[1:] if parts[0] == "uniform" else parts
        if len(numbers) != (2 if parts[0] == "uniform" else 1) or not all(n.isdecimal() and int(n) for n in numbers):
            raise ConfigError(f"{option}: expected a number of tokens or uniform:LOW:HIGH, got {text!r}")
        low, high = int(numbers[0]), int(numbers[-1])
        if low > high:
            raise ConfigError(f"{option}: {low} is above {high} in {text!r}")
        return cls(parts[0] if parts[0] == "uniform" else "fixed", low, high)

    def draw(self, count: int, seed: int) -> list[int]:
        """Return `count` lengths, the same for the same seed."""
        generator = random.Random(seed)
        return [generator.randint(self.low, self.high) for _ in range(count)]

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.kind} from {self.low} to {self.high}"


@dataclass(frozen=True)
class Workload:
    """The sequences of one iteration over all ranks.

    Attributes:
        prompts: tokens of every prompt.
        responses: tokens of every response, those of a prompt next to each other.
        samples: responses per prompt.
        decode_steps: decode steps of the rehearsed rollout; all responses of it end after that many.
        description: where the lengths are from, for the report.
    """

    prompts: Sequence[int]
    responses: Sequence[int]
    samples: int
    decode_steps: int
    description: str

    def prompt_tokens(self, vocab_size: int) -> list[list[int]]:
        """Return the prompts; the last id of the vocabulary is left for the stop token."""
        return [_tokens(n, length, vocab_size) for n, length in enumerate(self.prompts)]

    def full_responses(self, vocab_size: int) -> list[Response]:
        """Return all responses at their full lengths, as the batches of inference and update have them."""
        prompts = self.prompt_tokens(vocab_size)
        return [
            Response(
                n // self.samples,
                n % self.samples,
                n,
                prompts[n // self.samples],
                _tokens(n + 1, length, vocab_size),
                [0.0] * length,
                "stop",
            )
            for n, length in enumerate(self.responses)
        ]


def _tokens(number: int, length: int, vocab_size: int) -> list[int]:
    ids = max(min(_TOKENS, vocab_size - 2), 1)
    # The first positions are the digits of the number.
    digits = [number // ids**position for position in range(min(length, _DIGITS))]
    others = [number * number + position * (number + 3) for position in range(_DIGITS, length)]
    return [1 + value % ids for value in (*digits, *others)]
