"""Argument checks shared by the public wrappers. Every message names the function, the argument and its value."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .stats import Moments
from .types import VocabShard

# Legend: A, actions of the packed stream. A shape is a tuple of extents; None accepts any extent.

IGNORED_LABEL = -100  # the value that torch.nn.functional.cross_entropy ignores by default
KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
_STREAMS = "the other tensors"
_unchecked: ContextVar[bool] = ContextVar("icegrt_unchecked", default=False)


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Leave out the checks inside a `with`: for a caller that repeats calls whose arguments have been checked once.

    A wrong argument then reads or writes memory that is not its own.
    """
    token = _unchecked.set(True)
    try:
        yield
    finally:
        _unchecked.reset(token)


def is_unchecked() -> bool:
    """Return whether checks are left out."""
    return _unchecked.get()


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype to compute in: fp64 if any input is fp64, fp32 otherwise."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def check_floating(op: str, name: str, x: Tensor, shape: tuple[int | None, ...], like: Tensor | None = None) -> None:
    """Raise unless x is a floating tensor of `shape` (None: any extent), on the device of `like`."""
    if _unchecked.get():
        return
    _check_tensor(op, name, x)
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {x.dtype}")
    _check_shape(op, name, x, shape)
    _check_device(op, name, x, like)


def check_integral(op: str, name: str, x: Tensor, shape: tuple[int | None, ...], like: Tensor | None = None) -> None:
    """Raise unless x is an int32 or int64 tensor of `shape`, on the device of `like`."""
    if _unchecked.get():
        return
    _check_tensor(op, name, x)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be int32 or int64, got {x.dtype}")
    _check_shape(op, name, x, shape)
    _check_device(op, name, x, like)


def check_rows(op: str, name: str, x: Tensor, rows: int, like: Tensor) -> None:
    """Raise unless x is a tensor with one entry for each row, on the device of `like`."""
    _check_tensor(op, name, x)
    _check_shape(op, name, x, (rows,))
    _check_device(op, name, x, like)


def check_mask(op: str, name: str, x: Tensor | None, shape: tuple[int | None, ...], like: Tensor | None = None) -> None:
    """Raise unless x is None or a tensor of `shape`: bool, integers that are 0 where masked, or floats of 0 and 1.

    The values of floats are read on the CPU only: on a device that would synchronise, and any number but 0 counts.
    """
    if x is None:
        return
    _check_tensor(op, name, x)
    _check_shape(op, name, x, shape)
    _check_device(op, name, x, like)
    if x.is_floating_point() and x.device.type == "cpu":
        # A share such as 0.5 would count as 1: masks do not weigh.
        bad = (x != 0) & (x != 1)
        if bad.any():
            entry = bad.nonzero()[0].tolist()
            value = float(x[tuple(entry)])
            where = entry[0] if len(entry) == 1 else entry
            raise ValueError(
                f"{op}: {name} must be 0 or 1 where it is floating point (a mask does not weigh: pass weights as "
                f"weights), got {value} at row {where}"
            )


def check_number(
    op: str,
    name: str,
    x: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: bool = False,
    like: Tensor | None = None,
) -> None:
    """Raise unless x is a finite Python number within [low, high], or a 0-dim tensor on the device of `like`.

    With `above`, x must exceed low. The value of a tensor is not read: that would synchronise the device.
    """
    if isinstance(x, Tensor):
        if x.dim() != 0:
            raise ValueError(f"{op}: {name} must be a number or a 0-dim tensor, got shape {tuple(x.shape)}")
        if like is not None and x.device != like.device:
            raise ValueError(f"{op}: {name} must be a number or on {like.device} like {_STREAMS}, got {x.device}")
        return
    if isinstance(x, bool) or not isinstance(x, Real):
        raise TypeError(f"{op}: {name} must be a number or a 0-dim tensor, got {type(x).__name__}")
    number: Any = x  # isinstance narrows x to Real, for which type checkers know no order
    if not math.isfinite(number) or number < low or number > high or (above and number == low):
        bound = f"{'>' if above else '>='} {low}" + (f" and <= {high}" if high < math.inf else "")
        raise ValueError(f"{op}: {name} must be finite and {bound}, got {x}")


def check_plain_number(op: str, name: str, x: Any, **bounds: Any) -> None:
    """Raise unless x is a finite Python number within `bounds`. For values that steer control flow on the host."""
    if _unchecked.get():
        return
    if isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a Python number, got a tensor")
    check_number(op, name, x, **bounds)


def check_choice(op: str, name: str, x: str, options: tuple[str, ...]) -> None:
    """Raise unless x is one of `options`."""
    if x not in options:
        raise ValueError(f"{op}: {name} must be one of {', '.join(options)}, got {x!r}")


def check_moments(op: str, x: Moments | None, like: Tensor) -> None:
    """Raise unless x is None or Moments on the device of `like`."""
    if x is not None and not isinstance(x, Moments):
        raise TypeError(f"{op}: moments must be Moments or None, got {type(x).__name__}")
    if x is not None and x.mean.device != like.device:
        raise ValueError(f"{op}: moments must be on {like.device} like {_STREAMS}, got {x.mean.device}")


def check_shard(op: str, x: VocabShard | None, columns: int) -> None:
    """Raise unless x is None or a VocabShard of `columns` columns."""
    if _unchecked.get():
        return
    if x is None:
        return
    if not isinstance(x, VocabShard):
        raise TypeError(f"{op}: shard must be a VocabShard or None, got {type(x).__name__}")
    if x.size != columns:
        raise ValueError(f"{op}: shard.size must be the vocabulary extent {columns}, got {x.size}")


def check_labels_in_range(op: str, labels_A: Tensor, vocab_size: int) -> None:
    """Raise for a CPU label outside the vocabulary. On a device such a label yields -inf: a check would synchronise."""
    if labels_A.device.type != "cpu" or labels_A.numel() == 0:
        return
    bad = ((labels_A < 0) & (labels_A != IGNORED_LABEL)) | (labels_A >= vocab_size)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"{op}: labels_A must lie in [0, {vocab_size}) or be {IGNORED_LABEL}, got {int(labels_A[row])} at row {row}"
        )


def check_finite_rows(op: str, name: str, x_A: Tensor, mask_A: Tensor | None, labels_A: Tensor | None) -> None:
    """Raise for a CPU entry that counts and is not finite. On a device the check would synchronise.

    An entry counts if its mask is not 0 and its label is not IGNORED_LABEL.
    """
    if x_A.device.type != "cpu":
        return
    bad_A = ~x_A.isfinite()
    if mask_A is not None:
        bad_A = bad_A & (mask_A != 0)
    if labels_A is not None:
        bad_A = bad_A & (labels_A != IGNORED_LABEL)
    if bad_A.any():
        row = int(bad_A.nonzero()[0])
        raise ValueError(f"{op}: {name} must be finite where a token counts, got {float(x_A[row])} at row {row}")


def check_overwritable(op: str, name: str, x: Tensor) -> None:
    """Raise unless backward may overwrite x: x is no leaf, and no two of its elements share memory."""
    if x.requires_grad and x.is_leaf:
        raise ValueError(f"{op}: {name} must not be a leaf when its gradient is to be written over it")
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(f"{op}: {name} must not be expanded when its gradient is to be written over it")


def check_out(op: str, name: str, out: Tensor, shape: tuple[int, ...], inputs: tuple[Tensor, ...]) -> None:
    """Raise unless `out` can take a result of `shape`, in dtype and on the device of the first of `inputs`.

    No gradient may follow: a result in the caller's buffer belongs to no graph.
    """
    check_floating(op, name, out, shape, inputs[0])
    if out.dtype != inputs[0].dtype:
        raise TypeError(f"{op}: {name} must be {inputs[0].dtype} like the result, got {out.dtype}")
    if torch.is_grad_enabled() and (out.requires_grad or any(x.requires_grad for x in inputs)):
        raise ValueError(f"{op}: {name} takes no gradient; call it under torch.no_grad(), or without {name}")
    if 0 in out.stride() and any(stride == 0 and size > 1 for stride, size in zip(out.stride(), shape, strict=True)):
        raise ValueError(f"{op}: {name} must not be expanded")


def check_contiguous(op: str, name: str, x: Tensor) -> None:
    """Raise unless x is contiguous."""
    if _unchecked.get():
        return
    if not x.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {x.stride()}")


def check_apart(op: str, name: str, out: Tensor, other_name: str, other: Tensor, same: bool = False) -> None:
    """Raise if the memory of `out` begins or ends within that of another tensor. `same`: it may be that tensor."""
    if _unchecked.get():
        return
    if out.device.type == "meta" or not out.numel() or not other.numel():
        return
    first, last = _memory_range(out)
    other_first, other_last = _memory_range(other)
    if last <= other_first or other_last <= first:
        return
    if not (same and first == other_first and out.stride() == other.stride() and out.shape == other.shape):
        raise ValueError(
            f"{op}: {name} must not overlap with {other_name}" + (", unless it is the same tensor" if same else "")
        )


def _memory_range(x: Tensor) -> tuple[int, int]:
    first, elements = x.data_ptr(), x.numel()
    if not x.is_contiguous():
        elements = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return first, first + elements * x.element_size()


def single_backward(op: str) -> None:
    """Raise under create_graph. A hand-written backward has no derivative, and autograd would report it as zero."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: double backward is not supported (its backward is not differentiable); use create_graph=False, or "
            f"the plain PyTorch meaning under use_backend('reference')"
        )


def _check_tensor(op: str, name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    # Compare by name: importing DTensor's module costs a second, which every user of the library would pay.
    if type(x).__name__ == "DTensor":
        raise TypeError(
            f"{op}: {name} must be a plain tensor, got a DTensor; call inside the module that FSDP2 wraps, where "
            f"parameters are whole, or pass {name}.full_tensor()"
        )


def _check_shape(op: str, name: str, x: Tensor, shape: tuple[int | None, ...]) -> None:
    have = x.shape
    if have == shape:  # the usual case, without a loop
        return
    if len(have) != len(shape) or any(
        want is not None and size != want for size, want in zip(have, shape, strict=True)
    ):
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{op}: {name} must have shape ({wanted}), got {tuple(x.shape)}")


def _check_device(op: str, name: str, x: Tensor, like: Tensor | None) -> None:
    if like is not None and x.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} like {_STREAMS}, got {x.device}")
