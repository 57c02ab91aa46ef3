"""Sampling whose outcome does not depend on batch order, batch size or the split of the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import validate
from ..dispatch import select
from ..types import VocabShard
from .inputs import Distribution, NoiseKey

# Legend: N, rows; V, columns of this rank's slice; W, 32-bit words of the whole vocabulary.


def sample_tokens(
    logits_NV: Tensor,
    *,
    temperature: float | Tensor,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor,
    sequence_ids: Tensor,
    positions: Tensor,
    allowed_NW: Tensor | None = None,
    shard: VocabShard | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return one sampled token per row, and its log-prob under the distribution that it was drawn from.

    With z = logits / temperature after truncation, and u a hash of (seed, sequence id, position, global id):

        token = argmax(z - log(-log(1 - u)))
        logprob = z[token] - log sum exp(z)

    Source: the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030). Equal maxima go to the lowest
    id. Ids that are not allowed are left out first. Truncation follows in the order of transformers: top_k, top_p, then
    min_p, which compares with the largest probability and so does not depend on the other two.

    Each of temperature, top_k, top_p, min_p and seed is a number for all rows, or a tensor [N] with one for each row. A
    row has the same token and log-prob either way, alone and in a batch of mixed settings. Values of tensors are
    checked on CPUs; on a device nothing is read on the host, and tensors of top_k, top_p and min_p count as settings
    that truncate.

    Args:
        logits_NV: [N, V] floating; this rank's slice if `shard` has a group.
        temperature: >= 0, tensors fp32. 0 takes the arg-max without truncation and reports the log-prob at
            temperature 1.
        top_k: Keep the top_k largest logits; 0 keeps all. Tensors int32.
        top_p: Of those keep the smallest set of mass >= top_p, in (0, 1]; 1 keeps all. Tensors fp32.
        min_p: Keep tokens of probability >= min_p * the largest one, in [0, 1]; 0 keeps all. Tensors fp32.
        seed: Tensors int64.
        sequence_ids: [N] int32 or int64.
        positions: [N] int32 or int64. Seed, sequence id and position name the draw.
        allowed_NW: [N, ceil(vocabulary / 32)] int32: bit id % 32 of word id / 32 is set if the global id may be
            sampled, on every rank of a group alike. A row without any is an error on CPUs. On a device its token is id
            0 with a log-prob of -inf (NaN over a sharded vocabulary), as in a row of logits of -inf. None: all ids.
        shard: This rank's slice of the vocabulary. None: the columns are the vocabulary.
        out: (token_N, logprob_N), contiguous, written in place; None: they are allocated.

    Returns:
        Tuple (token_N, logprob_N): global ids in int64, and nats in fp32 (fp64 for fp64 logits); both [N], equal on
        every rank of the shard's group, without gradient. `out` if it was passed.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A shape, device or range is wrong, or no id of a row is allowed.
    """
    op = "sample_tokens"
    validate.check_floating(op, "logits_NV", logits_NV, (None, None))
    rows = (logits_NV.shape[0],)
    validate.check_integral(op, "sequence_ids", sequence_ids, rows, logits_NV)
    validate.check_integral(op, "positions", positions, rows, logits_NV)
    _check_setting(op, "temperature", temperature, torch.float32, logits_NV, low=0.0)
    _check_setting(op, "top_p", top_p, torch.float32, logits_NV, low=0.0, high=1.0, above=True)
    _check_setting(op, "min_p", min_p, torch.float32, logits_NV, low=0.0, high=1.0)
    _check_setting(op, "top_k", top_k, torch.int32, logits_NV, low=0)
    _check_setting(op, "seed", seed, torch.int64, logits_NV)
    validate.check_shard(op, shard, logits_NV.shape[1])
    if logits_NV.shape[1] == 0:
        raise ValueError(f"{op}: logits_NV must have at least one column, got shape {tuple(logits_NV.shape)}")
    if allowed_NW is not None:
        allowed_NW = _checked_allowed(op, allowed_NW, logits_NV, shard)
    if out is not None:
        _check_out(op, out, logits_NV)
    distribution = Distribution(_number(temperature), top_k, _number(top_p), _number(min_p), allowed_NW)
    return select(op, logits_NV)(logits_NV, distribution, NoiseKey(seed, sequence_ids, positions), shard, out)


def _number(x: float | Tensor) -> float | Tensor:
    return x if isinstance(x, Tensor) else float(x)


def _check_setting(op: str, name: str, x: Any, dtype: torch.dtype, like: Tensor, **bounds: Any) -> None:
    """Raise unless x is a Python number within `bounds`, or a tensor [N] of `dtype`, whose values CPUs check."""
    if not isinstance(x, Tensor):
        if dtype == torch.float32:
            validate.check_plain_number(op, name, x, **bounds)
        elif isinstance(x, bool) or not isinstance(x, int) or ("low" in bounds and x < bounds["low"]):
            least = f" >= {bounds['low']}" if bounds else ""
            raise ValueError(f"{op}: {name} must be an int{least}, got {x!r}")
        return
    if x.dtype != dtype:
        raise TypeError(f"{op}: {name} must be a number or a tensor of {dtype}, got {x.dtype}")
    validate.check_rows(op, name, x, like.shape[0], like)
    if x.device.type != "cpu" or not bounds:
        return
    good = (x > bounds["low"]) if bounds.get("above") else (x >= bounds["low"])
    good &= x <= bounds.get("high", torch.finfo(torch.float32).max)
    if not good.all():
        row = int((~good).nonzero()[0])
        limits = f"{'>' if bounds.get('above') else '>='} {bounds['low']}"
        limits += f" and <= {bounds['high']}" if "high" in bounds else ""
        raise ValueError(f"{op}: {name} must be finite and {limits}, got {x[row].item()} at row {row}")


def _checked_allowed(op: str, allowed_NW: Tensor, logits_NV: Tensor, shard: VocabShard | None) -> Tensor:
    """Return the words with contiguous rows. Raise if they do not fit, or on a CPU if a row allows nothing."""
    vocabulary = logits_NV.shape[1] if shard is None else shard.vocab_size
    validate.check_integral(op, "allowed_NW", allowed_NW, (logits_NV.shape[0], -(-vocabulary // 32)), logits_NV)
    if allowed_NW.dtype != torch.int32:
        raise TypeError(f"{op}: allowed_NW must be int32, got {allowed_NW.dtype}")
    if allowed_NW.device.type == "cpu":
        # Bits behind the vocabulary name no id.
        last = allowed_NW[:, -1] & ((1 << vocabulary % 32) - 1 if vocabulary % 32 else -1)
        empty = ~(allowed_NW[:, :-1].any(1) | (last != 0))
        if empty.any():
            raise ValueError(
                f"{op}: allowed_NW must allow an id in every row, got none at row {int(empty.nonzero()[0])}"
            )
    return allowed_NW if allowed_NW.stride(1) == 1 or allowed_NW.shape[1] == 1 else allowed_NW.contiguous()


def _check_out(op: str, out: tuple[Tensor, Tensor], logits_NV: Tensor) -> None:
    wanted = (("token_N", torch.int64), ("logprob_N", validate.wide_dtype(logits_NV)))
    if not isinstance(out, tuple) or len(out) != len(wanted):
        raise TypeError(f"{op}: out must be a tuple (token_N, logprob_N), got {type(out).__name__}")
    for (name, dtype), x in zip(wanted, out, strict=True):
        validate.check_rows(op, f"{name} of out", x, logits_NV.shape[0], logits_NV)
        if x.dtype != dtype:
            raise TypeError(f"{op}: {name} of out must be {dtype}, got {x.dtype}")
        validate.check_contiguous(op, f"{name} of out", x)
