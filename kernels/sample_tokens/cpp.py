"""sample_tokens on CPU threads (csrc/sample_tokens.hpp): a row is read twice, and logarithms are taken of few columns.

The hash is that of reference.py, bit for bit, and candidates are compared in fp64 as there. Truncation sorts no row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from icegrt import _C

from ..common.host import address, hold
from ..dispatch import log_launch
from ..types import VocabShard
from ..validate import wide_dtype
from .inputs import Distribution, Draw, NoiseKey, deliver
from .reference import merge_draws, sampling_logits

# Legend: N, rows; V, columns of this rank's slice, padding included.

_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float64: "float64"}
_NO_DRAW = (None, None, None)


@torch.no_grad()
def sample_tokens(
    logits_NV: Tensor,
    distribution: Distribution,
    key: NoiseKey,
    shard: VocabShard | None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return tokens and log-probs; see the public function."""
    sharded = shard is not None and shard.group is not None
    # 1. Truncation over a sharded vocabulary needs all ranks: torch exchanges numbers (truncation.py).
    if sharded and distribution.truncates:
        logits_NV = sampling_logits(logits_NV, distribution, shard)
        distribution = distribution.without_truncation()
    # 2. This rank's draw.
    N, wide = logits_NV.shape[0], wide_dtype(logits_NV)
    token_N, logprob_N = out or (logits_NV.new_empty(N, dtype=torch.int64), logits_NV.new_empty(N, dtype=wide))
    if not sharded:
        _run(logits_NV, distribution, key, shard, (token_N, logprob_N, *_NO_DRAW))
        return token_N, logprob_N
    perturbed_N, logsumexp_N = logits_NV.new_empty(2, N, dtype=torch.float64)
    draw = Draw(perturbed_N, token_N, logits_NV.new_empty(N, dtype=wide), logsumexp_N)
    _run(logits_NV, distribution, key, shard, (token_N, logprob_N, perturbed_N, draw.logit, logsumexp_N))
    # 3. The best of all ranks.
    assert shard is not None
    return deliver(*merge_draws(draw, distribution.scale, shard), out)


def _run(
    logits_NV: Tensor,
    distribution: Distribution,
    key: NoiseKey,
    shard: VocabShard | None,
    results: tuple[Tensor | None, ...],
) -> None:
    rows = logits_NV if logits_NV.stride(1) == 1 else logits_NV.contiguous()
    allowed = distribution.allowed_NW
    settings = (distribution.temperature, distribution.top_k, distribution.top_p, distribution.min_p, key.signed_seed)
    columns = [x.contiguous() if isinstance(x, Tensor) else None for x in settings]
    temperature, top_k, top_p, min_p, seed = (0 if isinstance(x, Tensor) else x for x in settings)
    ids, positions = (x.to(torch.int64).contiguous() for x in (key.sequence_ids, key.positions))
    tensors = (rows, ids, positions, *columns, allowed, *results)
    log_launch("sample_tokens", "cpp")
    _C.sample_tokens(
        _NAMES[logits_NV.dtype],
        tuple(map(address, tensors)),
        (
            rows.shape[0],
            rows.shape[1] if shard is None else min(rows.shape[1], shard.valid),
            rows.stride(0),
            0 if shard is None else shard.start,
            0 if allowed is None else allowed.stride(0),
        ),
        (float(temperature), float(top_p), float(min_p)),
        (int(top_k), int(seed)),
        torch.get_num_threads(),
    )
    hold(*tensors)
