"""Argument checks shared by the public wrappers. Every message names the function, the argument and what was given."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from .types import Moments, VocabShard

IGNORED_LABEL = -100
KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
_STREAMS = "the other tensors"


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of the mathematics: fp64 if any input is fp64, fp32 otherwise."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def check_floating(op: str, name: str, x: Tensor, shape: tuple[int | None, ...], like: Tensor | None = None) -> None:
    """x is a floating tensor of `shape` (None: any extent), on the device of `like`."""
    _tensor(op, name, x)
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {x.dtype}")
    _shape(op, name, x, shape)
    _device(op, name, x, like)


def check_integral(op: str, name: str, x: Tensor, shape: tuple[int | None, ...], like: Tensor | None = None) -> None:
    """x is an int32 or int64 tensor of `shape`, on the device of `like`."""
    _tensor(op, name, x)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be int32 or int64, got {x.dtype}")
    _shape(op, name, x, shape)
    _device(op, name, x, like)


def check_mask(op: str, name: str, x: Tensor | None, shape: tuple[int | None, ...], like: Tensor | None = None) -> None:
    """x is None or a tensor of `shape`, bool or a number that is 0 where masked."""
    if x is None:
        return
    _tensor(op, name, x)
    _shape(op, name, x, shape)
    _device(op, name, x, like)


def check_number(
    op: str,
    name: str,
    x,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: bool = False,
    like: Tensor | None = None,
) -> None:
    """x is a finite Python number within [low, high] (above: x > low), or a 0-dim tensor on the device of `like`, whose
    value is not read."""
    if isinstance(x, Tensor):
        if x.dim() != 0:
            raise ValueError(f"{op}: {name} must be a number or a 0-dim tensor, got shape {tuple(x.shape)}")
        if like is not None and x.device != like.device:
            raise ValueError(f"{op}: {name} must be a number or on {like.device} like {_STREAMS}, got {x.device}")
        return
    if isinstance(x, bool) or not isinstance(x, Real):
        raise TypeError(f"{op}: {name} must be a number or a 0-dim tensor, got {type(x).__name__}")
    if not math.isfinite(x) or x < low or x > high or (above and x == low):
        bound = f"{'>' if above else '>='} {low}" + (f" and <= {high}" if high < math.inf else "")
        raise ValueError(f"{op}: {name} must be finite and {bound}, got {x}")


def check_plain_number(op: str, name: str, x, **bounds) -> None:
    """A finite Python number: for values that shape control flow and must not be read from a device."""
    if isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a Python number, got a tensor")
    check_number(op, name, x, **bounds)


def check_choice(op: str, name: str, x: str, options: tuple[str, ...]) -> None:
    if x not in options:
        raise ValueError(f"{op}: {name} must be one of {', '.join(options)}, got {x!r}")


def check_moments(op: str, x: Moments | None, like: Tensor) -> None:
    if x is not None and not isinstance(x, Moments):
        raise TypeError(f"{op}: moments must be Moments or None, got {type(x).__name__}")
    if x is not None and x.mean.device != like.device:
        raise ValueError(f"{op}: moments must be on {like.device} like {_STREAMS}, got {x.mean.device}")


def check_shard(op: str, x: VocabShard | None, columns: int) -> None:
    if x is None:
        return
    if not isinstance(x, VocabShard):
        raise TypeError(f"{op}: shard must be a VocabShard or None, got {type(x).__name__}")
    if x.size != columns:
        raise ValueError(f"{op}: shard.size must be the vocabulary extent {columns}, got {x.size}")


def check_labels_in_range(op: str, labels_A: Tensor, vocab_size: int) -> None:
    """On CPU a label outside the vocabulary is refused; on a device it yields -inf (a check would stop the stream)."""
    if labels_A.device.type != "cpu" or labels_A.numel() == 0:
        return
    bad = ((labels_A < 0) & (labels_A != IGNORED_LABEL)) | (labels_A >= vocab_size)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"{op}: labels_A must lie in [0, {vocab_size}) or be {IGNORED_LABEL}, got {int(labels_A[row])} at row {row}"
        )


def check_overwritable(op: str, name: str, x: Tensor) -> None:
    """x may be written over in backward: not a leaf, and no two of its elements share memory."""
    if x.requires_grad and x.is_leaf:
        raise ValueError(f"{op}: {name} must not be a leaf when its gradient is to be written over it")
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(f"{op}: {name} must not be expanded when its gradient is to be written over it")


def single_backward(op: str) -> None:
    """Called by a backward that is written by hand: its own gradient does not exist, and must not read as zero."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: double backward is not supported (its backward is not differentiable); use create_graph=False, or "
            f"the plain PyTorch meaning under use_backend('reference')"
        )


def _tensor(op: str, name: str, x) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if type(x).__name__ == "DTensor":  # by name: importing its module costs every user of the library a second
        raise TypeError(
            f"{op}: {name} must be a plain tensor, got a DTensor; call inside the module that FSDP2 wraps, where "
            f"parameters are whole, or pass {name}.full_tensor()"
        )


def _shape(op: str, name: str, x: Tensor, shape: tuple[int | None, ...]) -> None:
    if x.dim() != len(shape) or any(
        want is not None and have != want for have, want in zip(x.shape, shape, strict=True)
    ):
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{op}: {name} must have shape ({wanted}), got {tuple(x.shape)}")


def _device(op: str, name: str, x: Tensor, like: Tensor | None) -> None:
    if like is not None and x.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} like {_STREAMS}, got {x.device}")


def check_head(op, hidden_AH, weight_VH, labels_A, mask_A, temperature, shard, chunk_rows, weight_grad_out) -> None:
    """Checks the arguments that both linear operations share."""
    check_floating(op, "hidden_AH", hidden_AH, (None, None))
    check_floating(op, "weight_VH", weight_VH, (None, hidden_AH.shape[1]), hidden_AH)
    if hidden_AH.dtype != weight_VH.dtype and not torch.is_autocast_enabled(hidden_AH.device.type):
        raise TypeError(
            f"{op}: hidden_AH and weight_VH must have one dtype (or run under autocast), got {hidden_AH.dtype} and "
            f"{weight_VH.dtype}"
        )
    check_integral(op, "labels_A", labels_A, (hidden_AH.shape[0],), hidden_AH)
    check_mask(op, "mask_A", mask_A, (hidden_AH.shape[0],), hidden_AH)
    check_plain_number(op, "temperature", temperature, low=0.0, above=True)
    check_shard(op, shard, weight_VH.shape[0])
    if weight_VH.shape[0] == 0:
        raise ValueError(f"{op}: weight_VH must have at least one row, got shape {tuple(weight_VH.shape)}")
    if chunk_rows is not None and (isinstance(chunk_rows, bool) or not isinstance(chunk_rows, int) or chunk_rows < 1):
        raise ValueError(f"{op}: chunk_rows must be an int >= 1 or None, got {chunk_rows!r}")
    if weight_grad_out is not None:
        check_floating(op, "weight_grad_out", weight_grad_out, tuple(weight_VH.shape), weight_VH)
        wanted = wide_dtype(hidden_AH, weight_VH)
        if weight_grad_out.dtype != wanted or weight_grad_out.requires_grad:
            raise ValueError(
                f"{op}: weight_grad_out must be a {wanted} buffer that requires no gradient, got "
                f"{weight_grad_out.dtype} with requires_grad={weight_grad_out.requires_grad}"
            )
    vocab_size = weight_VH.shape[0] if shard is None else shard.vocab_size
    masked = labels_A if mask_A is None else torch.where(mask_A != 0, labels_A, IGNORED_LABEL)
    check_labels_in_range(op, masked, vocab_size)


def check_objective(op, like, old_logprob_A, advantage_A, ref_logprob_A, mask_A, weight_A, normalizer, moments, terms):
    """Checks the arguments that both policy losses share; returns the streams detached, for they are constants."""
    shape = (like.shape[0],)
    check_floating(op, "advantage_A", advantage_A, shape, like)
    for name, x in (("old_logprob_A", old_logprob_A), ("ref_logprob_A", ref_logprob_A), ("weight_A", weight_A)):
        if x is not None:
            check_floating(op, name, x, shape, like)
    check_mask(op, "mask_A", mask_A, shape, like)
    check_number(op, "normalizer", normalizer, low=0.0, above=True, like=like)
    check_plain_number(op, "clip_low", terms["clip_low"], low=0.0, high=1.0)
    check_plain_number(op, "clip_high", terms["clip_high"], low=0.0)
    if terms["dual_clip"] is not None:
        check_plain_number(op, "dual_clip", terms["dual_clip"], low=1.0, above=True)
    check_number(op, "kl_coef", terms["kl_coef"], low=0.0, like=like)
    check_number(op, "entropy_coef", terms["entropy_coef"], like=like)
    check_choice(op, "kl_estimator", terms["kl_estimator"], KL_ESTIMATORS)
    check_choice(op, "kl_gradient", terms["kl_gradient"], ("k2", "raw"))
    if ref_logprob_A is None and (isinstance(terms["kl_coef"], Tensor) or terms["kl_coef"] != 0):
        raise ValueError(f"{op}: ref_logprob_A must be given when kl_coef is {terms['kl_coef']}, got None")
    check_moments(op, moments, like)
    return tuple(None if x is None else x.detach() for x in (old_logprob_A, advantage_A, ref_logprob_A, weight_A))
