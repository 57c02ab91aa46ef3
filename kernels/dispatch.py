"""The one selector of backends: which implementation of an operation runs, and why.

Order of authority: `use_backend` (innermost first, an operation's own name before the general one), then the
environment variable ICEGRT_BACKEND ("reference", or "token_logprobs=triton,shaped_gae=reference"), then auto.
auto takes the first of these that an operation has and that can run: Triton for CUDA tensors, C++ for CPU tensors,
PyTorch in chunks ("chunked", for operations whose reference takes much memory), the reference. A backend that is
requested by name is used or is an error: a silent fallback would make a benchmark or a test lie.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "cpp", "chunked", "reference")

# operation -> backend -> "module:function" under this package, imported when first chosen.
IMPLEMENTATIONS = MappingProxyType(
    {
        "token_logprobs": {
            "triton": "token_logprobs.triton:token_logprobs",
            "reference": "token_logprobs.reference:token_logprobs",
        },
        "linear_logprobs": {
            "triton": "linear.triton:linear_logprobs",
            "cpp": "linear.cpp:linear_logprobs",
            "chunked": "linear.chunked:linear_logprobs",
            "reference": "linear.reference:linear_logprobs",
        },
        "linear_ppo_loss": {
            "triton": "linear.triton:linear_ppo_loss",
            "cpp": "linear.cpp:linear_ppo_loss",
            "chunked": "linear.chunked:linear_ppo_loss",
            "reference": "linear.reference:linear_ppo_loss",
        },
        "ppo_policy_loss": {
            "triton": "ppo_policy_loss.triton:ppo_policy_loss",
            "reference": "ppo_policy_loss.reference:ppo_policy_loss",
        },
        "value_loss": {"triton": "value_loss.triton:value_loss", "reference": "value_loss.reference:value_loss"},
        "kl_divergence": {
            "triton": "kl_divergence.triton:kl_divergence",
            "reference": "kl_divergence.reference:kl_divergence",
        },
        "shaped_gae": {
            "triton": "shaped_gae.triton:shaped_gae",
            "cpp": "shaped_gae.cpp:shaped_gae",
            "reference": "shaped_gae.reference:shaped_gae",
        },
        "masked_moments": {
            "triton": "whitening.triton:masked_moments",
            "reference": "whitening.reference:masked_moments",
        },
        "whiten": {"triton": "whitening.triton:whiten", "reference": "whitening.reference:whiten"},
        "sample_tokens": {
            "triton": "sample_tokens.triton:sample_tokens",
            "cpp": "sample_tokens.cpp:sample_tokens",
            "reference": "sample_tokens.reference:sample_tokens",
        },
        "rms_norm": {
            "triton": "rms_norm.triton:rms_norm",
            "cpp": "rms_norm.cpp:rms_norm",
            "reference": "rms_norm.reference:rms_norm",
        },
        "add_rms_norm": {
            "triton": "rms_norm.triton:add_rms_norm",
            "cpp": "rms_norm.cpp:add_rms_norm",
            "reference": "rms_norm.reference:add_rms_norm",
        },
        "rope": {
            "triton": "rope.triton:rope",
            "cpp": "rope.cpp:rope",
            "reference": "rope.reference:rope",
        },
        "rope_qkv": {
            "triton": "rope.triton:rope_qkv",
            "cpp": "rope.cpp:rope_qkv",
            "reference": "rope.reference:rope_qkv",
        },
        "swiglu": {
            "triton": "swiglu.triton:swiglu",
            "cpp": "swiglu.cpp:swiglu",
            "reference": "swiglu.reference:swiglu",
        },
        "write_kv": {
            "triton": "paged_kv.triton:write_kv",
            "cpp": "paged_kv.cpp:write_kv",
            "reference": "paged_kv.reference:write_kv",
        },
        "rope_write_kv": {
            "triton": "rope_write_kv.triton:rope_write_kv",
            "cpp": "rope_write_kv.cpp:rope_write_kv",
            "reference": "rope_write_kv.reference:rope_write_kv",
        },
        "copy_blocks": {
            "triton": "paged_kv.triton:copy_blocks",
            "cpp": "paged_kv.cpp:copy_blocks",
            "reference": "paged_kv.reference:copy_blocks",
        },
        "packed_attention": {
            "cpp": "packed_attention.cpp:packed_attention",
            "reference": "packed_attention.reference:packed_attention",
        },
        "paged_attention": {
            "triton": "paged_attention.triton:paged_attention",
            "cpp": "paged_attention.cpp:paged_attention",
            "reference": "paged_attention.reference:paged_attention",
        },
        "decode_linear": {
            "cpp": "decode_linear.cpp:decode_linear",
            "reference": "decode_linear.reference:decode_linear",
        },
        "lm_logits": {
            "cpp": "lm_logits.cpp:lm_logits",
            "chunked": "lm_logits.chunked:lm_logits",
            "reference": "lm_logits.reference:lm_logits",
        },
        "pack_padded": {"reference": "pack_padded:pack_rows"},
    }
)

_overrides: ContextVar[tuple[dict[str, str], ...]] = ContextVar("icegrt_backend", default=())
# Kinds of device whose tensors count as those of another kind.
_played: ContextVar[Mapping[str, str]] = ContextVar("icegrt_played_devices", default=MappingProxyType({}))
# Not a ContextVar: a backward on a device launches from autograd's own threads, which inherit none.
_recorders: list[list[tuple[str, str]]] = []


@contextlib.contextmanager
def use_backend(backend: str | None = None, **per_op: str) -> Iterator[None]:
    """Choose backends inside a `with`: `use_backend("reference")`, `use_backend(token_logprobs="triton")`, or both.

    The choice holds for the thread that enters the context.

    Args:
        backend: "auto", "triton", "cpp", "chunked" or "reference", for all operations without a choice of their own.
        **per_op: Operation name to backend.

    Yields:
        Nothing.

    Raises:
        ValueError: An operation or backend is unknown, or the operation lacks the backend.
    """
    choice = dict(per_op)
    if backend is not None:
        _check_backend("use_backend", backend)
        choice["*"] = backend
    _check_ops("use_backend", per_op)
    token = _overrides.set((*_overrides.get(), choice))
    try:
        yield
    finally:
        _overrides.reset(token)


@contextlib.contextmanager
def play_device(kind: str, played: str) -> Iterator[None]:
    """Choose backends for tensors of one kind of device as for another: a rehearsal has "meta" play "cuda"."""
    token = _played.set({**_played.get(), kind: played})
    try:
        yield
    finally:
        _played.reset(token)


def played_kind(kind: str) -> str:
    """Return the kind of device that tensors of a kind count as."""
    return _played.get().get(kind, kind)


@contextlib.contextmanager
def record_launches() -> Iterator[list[tuple[str, str]]]:
    """Record every kernel that any thread launches inside the `with`.

    Yields:
        List of (kernel name, backend), which grows in the order of the launches.
    """
    seen: list[tuple[str, str]] = []
    _recorders.append(seen)
    try:
        yield seen
    finally:
        _recorders[:] = [other for other in _recorders if other is not seen]


def log_launch(kernel: str, backend: str) -> None:
    """Record one launch. Kernel wrappers call it where they launch."""
    for seen in _recorders:
        seen.append((kernel, backend))


def available_backends(op: str) -> tuple[str, ...]:
    """Return the backends of an operation whose requirements are installed, best first.

    Args:
        op: Name of a public operation, for example "token_logprobs".

    Returns:
        Tuple of backend names.

    Raises:
        ValueError: The operation is unknown.
    """
    _check_ops("available_backends", [op])
    return tuple(b for b in IMPLEMENTATIONS[op] if _installed(b))


def describe(device: str | torch.device = "cuda" if torch.version.cuda else "cpu") -> dict[str, str]:
    """Return the backend that each operation would take for fp32 tensors on a device.

    Args:
        device: A torch device or its name. Default: "cuda" if torch was built for CUDA, else "cpu".

    Returns:
        Dictionary from operation to backend name.
    """
    device = torch.device(device)
    return {op: _resolve_backend(op, device.type, True)[0] for op in IMPLEMENTATIONS}


def select(op: str, *tensors: Tensor | None) -> Callable[..., Any]:
    """Return the implementation of `op` for these tensors. Raises RuntimeError if a named backend cannot run here."""
    # Triton computes in fp32; fp64 tensors go to a backend that has it.
    device = next((t.device.type for t in tensors if t is not None), "cpu")
    supported = True
    for t in tensors:
        supported &= t is None or t.dtype != torch.float64
    if not _overrides.get() and not _played.get():
        return _selected(op, device, supported, os.environ.get("ICEGRT_BACKEND", ""))
    backend, why = _resolve_backend(op, device, supported)
    _log_once(op, backend, device, why)
    return _load(op, backend)


@functools.cache
def _selected(op: str, device: str, supported: bool, environment: str) -> Callable[..., Any]:
    """Return the implementation outside all contexts: the choice depends on the arguments alone."""
    backend, why = _resolve_backend(op, device, supported)
    _log_once(op, backend, device, why)
    return _load(op, backend)


def _resolve_backend(op: str, device: str, supported: bool) -> tuple[str, str]:
    device = played_kind(device)
    # 1. A backend that is named must run.
    requested, source = _requested_backend(op)
    if requested != "auto":
        _check_runnable(op, requested, device, supported, source)
        return requested, source
    # 2. auto: the first that the operation has, that fits the tensors and that is installed.
    for backend in ("triton", "cpp", "chunked"):
        runs = {"triton": device == "cuda" and supported, "cpp": device == "cpu", "chunked": True}[backend]
        if runs and backend in IMPLEMENTATIONS[op] and _installed(backend):
            return backend, "auto"
    return "reference", "auto"


def _requested_backend(op: str) -> tuple[str, str]:
    # The innermost context first; an operation's own choice before the general one.
    for choice in reversed(_overrides.get()):
        for key in (op, "*"):
            if key in choice:
                return choice[key], "use_backend"
    choice = _parse_environment(os.environ.get("ICEGRT_BACKEND", ""))
    return choice.get(op, choice.get("*", "auto")), "ICEGRT_BACKEND" if choice else "auto"


@functools.cache
def _parse_environment(text: str) -> dict[str, str]:
    choice: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        op, _, backend = part.rpartition("=")
        _check_backend("ICEGRT_BACKEND", backend)
        if op:
            _check_ops("ICEGRT_BACKEND", {op: backend})
        choice[op or "*"] = backend
    return choice


def _check_runnable(op: str, backend: str, device: str, supported: bool, source: str) -> None:
    hint = f"; choose one of {', '.join(available_backends(op))} or auto"
    if backend not in IMPLEMENTATIONS[op]:
        raise RuntimeError(f"{op}: backend {backend!r} was asked for by {source} and this operation has none{hint}")
    if not _installed(backend):
        raise RuntimeError(f"{op}: backend {backend!r} was asked for by {source} and is not installed{hint}")
    if backend == "triton" and device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"{op}: backend 'triton' was asked for by {source}, but the tensors are on {device!r}; move them to a CUDA "
            f"device, or set TRITON_INTERPRET=1 before the first import{hint}"
        )
    if backend == "cpp" and device != "cpu":
        raise RuntimeError(f"{op}: backend 'cpp' was asked for by {source} and runs on the CPU, got {device!r}{hint}")
    if backend == "triton" and not supported:
        raise RuntimeError(f"{op}: backend 'triton' was asked for by {source} and computes in fp32, got fp64{hint}")


@functools.cache
def _installed(backend: str) -> bool:
    if backend in ("chunked", "reference"):
        return True
    # find_spec does not import: asking for Triton must not initialise it.
    try:
        return importlib.util.find_spec("triton" if backend == "triton" else "icegrt._C") is not None
    except (ImportError, ValueError):
        return False


@functools.cache
def _load(op: str, backend: str) -> Callable[..., Any]:
    module, name = IMPLEMENTATIONS[op][backend].split(":")
    return getattr(importlib.import_module(f".{module}", __package__), name)


@functools.cache
def _log_once(op: str, backend: str, device: str, why: str) -> None:
    log.info("%s runs on backend %s for %s tensors (%s)", op, backend, device, why)


def _check_backend(where: str, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{where}: expected one of {', '.join(BACKENDS)}, got {backend!r}")


def _check_ops(where: str, ops: Iterable[str]) -> None:
    for op in ops:
        if op not in IMPLEMENTATIONS:
            raise ValueError(f"{where}: unknown operation {op!r}; expected one of {', '.join(IMPLEMENTATIONS)}")
    for op, backend in ops.items() if isinstance(ops, dict) else ():
        _check_backend(where, backend)
        if backend != "auto" and backend not in IMPLEMENTATIONS[op]:
            raise ValueError(
                f"{where}: {op} has no backend {backend!r}; expected auto or one of {', '.join(IMPLEMENTATIONS[op])}"
            )
