"""Sampling whose outcome does not depend on batch order, batch size or the split of the vocabulary."""

from __future__ import annotations

from torch import Tensor

from .. import validate
from ..dispatch import select
from ..types import VocabShard
from .inputs import Distribution, NoiseKey


def sample_tokens(
    logits_NV: Tensor,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int,
    sequence_ids: Tensor,
    positions: Tensor,
    shard: VocabShard | None = None,
) -> tuple[Tensor, Tensor]:
    """Return one sampled token per row, and its log-prob under the distribution that it was drawn from.

    With z = logits / temperature after truncation, and u a hash of (seed, sequence id, position, global id):

        token = argmax(z - log(-log(1 - u)))
        logprob = z[token] - log sum exp(z)

    Source: the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030). Equal maxima go to the lowest
    id. Reading the logits once suffices; top-k and top-p find their thresholds first, in about 35 more passes each.

    Args:
        logits_NV: [N, V] floating; this rank's slice if `shard` has a group.
        temperature: Python number >= 0. 0 takes the arg-max and reports the log-prob at temperature 1.
        top_k: Keep the top_k largest logits; 0 keeps all. Applies before top_p.
        top_p: Keep the smallest set of mass >= top_p, in (0, 1]; 1 keeps all.
        seed: Python int.
        sequence_ids: [N] int32 or int64.
        positions: [N] int32 or int64. Seed, sequence id and position name the draw.
        shard: This rank's slice of the vocabulary. None: the columns are the vocabulary.

    Returns:
        Tuple (token_N, logprob_N): global ids in int64, and nats in fp32 (fp64 for fp64 logits); both [N], equal on
        every rank of the shard's group, without gradient.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A shape, device or range is wrong.
    """
    op = "sample_tokens"
    validate.check_floating(op, "logits_NV", logits_NV, (None, None))
    rows = (logits_NV.shape[0],)
    validate.check_integral(op, "sequence_ids", sequence_ids, rows, logits_NV)
    validate.check_integral(op, "positions", positions, rows, logits_NV)
    validate.check_plain_number(op, "temperature", temperature, low=0.0)
    validate.check_plain_number(op, "top_p", top_p, low=0.0, high=1.0, above=True)
    for name, x, low in (("top_k", top_k, 0), ("seed", seed, None)):
        if isinstance(x, bool) or not isinstance(x, int) or (low is not None and x < low):
            raise ValueError(f"{op}: {name} must be an int{'' if low is None else f' >= {low}'}, got {x!r}")
    validate.check_shard(op, shard, logits_NV.shape[1])
    if logits_NV.shape[1] == 0:
        raise ValueError(f"{op}: logits_NV must have at least one column, got shape {tuple(logits_NV.shape)}")
    distribution = Distribution(float(temperature), top_k, float(top_p))
    return select(op, logits_NV)(logits_NV, distribution, NoiseKey(seed, sequence_ids, positions), shard)
