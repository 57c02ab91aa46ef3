"""The bench of an operation of the trunk, forward and backward: ours, the reference, eager PyTorch, torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import harness, sweeps
from icegrt.kernels import use_backend

# Rows and hidden size: a decode step and a micro-batch of a small model, and a micro-batch of one of 7 billion.
SIZES = {"cpu": ((64, 256), (2048, 256), (1024, 3584)), "cuda": ((64, 3584), (8192, 3584), (8192, 8192))}


@dataclass(frozen=True)
class Piece:
    """An operation, the same in eager PyTorch as models without fused kernels form it, and its arguments.

    Attributes:
        name: of the operation.
        operation: the public function, on the arguments that `draw` returns.
        eager: the same with PyTorch's own operations, in the dtype of the arguments.
        draw: returns arguments for (rows, hidden size); those of two dimensions are tables and get no gradient.
    """

    name: str
    operation: Callable
    eager: Callable
    draw: Callable[[int, int], list[Tensor]]


def run(description: str, bench: str, pieces: list[Piece]) -> None:
    """Time the pieces in fp32 and bf16, without a gradient (forward) and with one (both)."""
    options = harness.arguments(description)
    rows = []
    for piece in pieces:
        for size, hidden in SIZES[options.device][: 2 if options.quick else None]:
            drawn = piece.draw(size, hidden)
            for dtype in (torch.float32, torch.bfloat16):
                arguments = [x.to(options.device, torch.float32 if x.dim() == 2 else dtype) for x in drawn]
                for mode in ("forward", "both"):
                    case = f"{piece.name} T{size} H{hidden} {str(dtype).removeprefix('torch.')} {mode}"
                    rows += _case(options, bench, case, piece, arguments, mode == "both")
    harness.write(bench, rows, options)


def _case(options, bench: str, case: str, piece: Piece, arguments: list[Tensor], backward: bool) -> list[dict]:
    ours = "triton" if options.device == "cuda" else "cpp"
    calls = {"ours": _on_backend(piece.operation, ours), "reference": _on_backend(piece.operation, "reference")}
    calls["eager"] = piece.eager
    if not options.quick:
        calls["torch.compile"] = torch.compile(piece.eager, dynamic=False)
    truth = _results(calls["reference"], [x.double() for x in arguments], backward)()
    largest = max(x.abs().max().item() for x in truth)

    def error(out: list[Tensor]) -> float:
        return max((a.double() - b).abs().max().item() for a, b in zip(out, truth, strict=True)) / largest

    traffic = sum(x.numel() * x.element_size() for x in arguments) * (4 if backward else 2)
    return harness.compare(
        bench,
        case,
        {name: _results(call, arguments, backward) for name, call in calls.items()},
        error=error,
        tolerance=2e-2 if arguments[0].dtype == torch.bfloat16 else 1e-4,
        rounds=options.rounds,
        device=options.device,
        floor=sweeps.floor_ms(options, traffic=traffic),
    )


def _on_backend(operation: Callable, backend: str) -> Callable:
    def call(*arguments: Tensor):
        with use_backend(backend):
            return operation(*arguments)

    return call


def _results(call: Callable, arguments: list[Tensor], backward: bool) -> Callable[[], list[Tensor]]:
    leaves = [x.detach().requires_grad_(backward and x.dim() != 2) for x in arguments]
    ones: list[Tensor] = []

    def run_once() -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            out = call(*leaves)
        out = list(out) if isinstance(out, tuple) else [out]
        if not backward:
            return out
        ones[:] = ones or [torch.ones_like(x) for x in out]
        return [*out, *torch.autograd.grad(out, [x for x in leaves if x.requires_grad], ones)]

    return run_once
