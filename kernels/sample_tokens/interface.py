"""Sampling whose outcome does not depend on batch order, batch size or the split of the vocabulary."""

from __future__ import annotations

from torch import Tensor

from .. import validate
from ..dispatch import select
from ..types import VocabShard


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
    """One token per row by Gumbel-max, and its log-prob under the distribution that it was drawn from.

    logits_NV: [N, V] floating, this rank's slice where `shard` has a group. temperature: Python number >= 0; 0 takes
    the arg-max and reports the log-prob at temperature 1. top_k 0 and top_p 1 truncate nothing; top_k applies first.
    seed: int; sequence_ids, positions: [N] int, which name the draw: the noise is a hash of (seed, sequence id,
    position, global vocabulary id) in fp32, equal maxima go to the lowest id. One pass over the logits; top-k and top-p
    find their thresholds first, in about 35 more passes each.
    Returns (token_N int64 global ids, logprob_N fp32 or fp64), equal on every rank of the shard's group. No gradient.
    Raises TypeError or ValueError naming the argument.
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
    return select(op, logits_NV)(
        logits_NV,
        temperature=float(temperature),
        top_k=top_k,
        top_p=float(top_p),
        seed=seed,
        sequence_ids=sequence_ids,
        positions=positions,
        shard=shard,
    )
