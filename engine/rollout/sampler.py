"""Sampling of the rows of a step, each with the settings of its request."""

from __future__ import annotations

from collections import Counter, abc
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from icegrt.kernels import VocabShard, sample_tokens
from icegrt.rollout.sequence import Distribution, Sequence

# Legend: N, samples; W, 32-bit words of a bitmask of the vocabulary; M, biased logits.


@dataclass(frozen=True)
class StepSettings:
    """The settings of a step's samples: numbers if all have the same, else tensors of N.

    Attributes:
        distribution: temperature, top_k, top_p, min_p and seed.
        allowed_NW: int32 bitmask of the ids that may be sampled; None: all.
        biases: (rows, ids, values) of M logits to change; None: none.
    """

    distribution: tuple
    allowed_NW: Tensor | None = None
    biases: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def is_static(self) -> bool:
        """Whether a step's kernels take no tensors that this step allocates."""
        return not isinstance(self.distribution[0], Tensor) and self.allowed_NW is None and self.biases is None


class SettingsTable:
    """Counts the settings of unfinished sequences, so that a step knows at once whether all have the same."""

    def __init__(self) -> None:
        self._distributions: Counter[Distribution] = Counter()
        self._masking = 0

    def add(self, sequence: Sequence) -> None:
        """Count a sequence that starts."""
        self._distributions[sequence.distribution] += 1
        self._masking += sequence.masks_logits

    def remove(self, sequence: Sequence) -> None:
        """Count a sequence that ends."""
        self._distributions[sequence.distribution] -= 1
        if not self._distributions[sequence.distribution]:
            del self._distributions[sequence.distribution]
        self._masking -= sequence.masks_logits

    def of_step(
        self, samples: abc.Sequence[tuple[Sequence, int]], padded: int, vocab_size: int, device: torch.device
    ) -> StepSettings:
        """Return the settings of a step.

        Args:
            samples: of each sample its sequence and the number of tokens that it has sampled before.
            padded: number of samples of the step with its padding.
            vocab_size: ids of the vocabulary.
            device: of the step.
        """
        # A step that computes parts of prompts alone samples nothing: any settings are its own.
        if not samples or (len(self._distributions) == 1 and not self._masking):
            return StepSettings(next(iter(self._distributions)))
        rows = [sequence.distribution for sequence, _ in samples]
        rows += [rows[0]] * (padded - len(rows))
        dtypes = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64)
        columns = zip(zip(*rows, strict=True), dtypes, strict=True)
        distribution = tuple(_to_device(torch.tensor(column, dtype=dtype), device) for column, dtype in columns)
        if not self._masking:
            return StepSettings(distribution)
        return StepSettings(
            distribution, _allowed(samples, padded, vocab_size, device), _biases(samples, vocab_size, device)
        )


def _allowed(
    samples: abc.Sequence[tuple[Sequence, int]], padded: int, vocab_size: int, device: torch.device
) -> Tensor | None:
    limited = [(row, s.sampling.allowed_token_ids) for row, (s, _) in enumerate(samples)]
    if all(ids is None for _, ids in limited):
        return None
    bits = np.ones((padded, -(-vocab_size // 32) * 32), dtype=np.uint8)
    for row, ids in limited:
        if ids is not None:
            bits[row] = 0
            bits[row, list(ids)] = 1
    words_NW = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    return _to_device(torch.from_numpy(words_NW), device)


def _biases(
    samples: abc.Sequence[tuple[Sequence, int]], vocab_size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor] | None:
    rows: list[int] = []
    ids: list[int] = []
    values: list[float] = []
    for row, (sequence, sampled) in enumerate(samples):
        sampling = sequence.sampling
        biases = dict(sampling.logit_bias)
        if sampled < sampling.min_new_tokens:
            biases |= dict.fromkeys((t for t in sequence.stop_ids if t < vocab_size), -np.inf)
        rows += [row] * len(biases)
        ids += biases
        values += biases.values()
    if not rows:
        return None
    index = [_to_device(torch.tensor(x, dtype=torch.int64), device) for x in (rows, ids)]
    return index[0], index[1], _to_device(torch.tensor(values, dtype=torch.float32), device)


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


def sample(
    logits_NV: Tensor,
    settings: StepSettings,
    sequence_ids_N: Tensor,
    positions_N: Tensor,
    shard: VocabShard | None,
    out: tuple[Tensor, Tensor],
) -> None:
    """Write a token and its log-prob for each row of logits, which biases change in place.

    Args:
        logits_NV: [N, V] fp32, this rank's slice of the vocabulary.
        settings: of the rows.
        sequence_ids_N, positions_N: the keys of the noise.
        shard: this rank's slice; None: the whole vocabulary.
        out: [N] int64 tokens and [N] fp32 log-probs.
    """
    if settings.biases is not None:
        row_M, id_M, value_M = settings.biases
        if shard is not None:  # ids of other ranks change a logit by 0
            id_M = id_M - shard.start
            is_local_M = (id_M >= 0) & (id_M < logits_NV.shape[1])
            id_M, value_M = id_M.clamp(0, logits_NV.shape[1] - 1), torch.where(is_local_M, value_M, 0.0)
        logits_NV.index_put_((row_M, id_M), value_M, accumulate=True)
    temperature, top_k, top_p, min_p, seed = settings.distribution
    sample_tokens(
        logits_NV,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        sequence_ids=sequence_ids_N,
        positions=positions_N,
        allowed_NW=settings.allowed_NW,
        shard=shard,
        out=out,
    )
