"""Iterations of icegrt: `python -m bench.end_to_end.icegrt_worker WORKLOAD DTYPE [key=value ...]`.

With RANK, WORLD_SIZE and MASTER_ADDR in its environment it is one rank of several.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.end_to_end.flops import ATTENTION, PRODUCTS, PhaseFlops
from bench.end_to_end.protocol import RUN_FOLDER, private_stdout, serve
from bench.end_to_end.recipe import ppo_config
from bench.end_to_end.workloads import Workload, tokenizer, worker_parser
from icegrt import _C, PPOConfig, PPOTrainer
from icegrt.rollout import stage

# Phases of the trainer that count as another one in processor time and operations.
PARTS = {"plan": "score", "shape": "score"}


class Phases:
    """The processor time of this process by phase. It also tells a counter of operations where phases end.

    A rank that waits for others takes no processor time. The time is that of all threads.

    Attributes:
        busy_seconds: by phase, of the iteration that runs.
        counter: of operations, or None.
    """

    def __init__(self) -> None:
        self.busy_seconds: dict[str, float] = {}
        self.counter: PhaseFlops | None = None
        self._begin = 0.0

    def begin(self, counter: PhaseFlops | None = None) -> None:
        """Begin an iteration."""
        self.busy_seconds, self.counter, self._begin = {}, counter, time.process_time()

    def end(self, phase: str) -> None:
        """Give what was done since the last end to `phase`, which may end several times."""
        now = time.process_time()
        self.busy_seconds[phase] = self.busy_seconds.get(phase, 0.0) + now - self._begin
        self._begin = now
        if self.counter is not None:
            self.counter.end_phase(phase)


class PhasedTrainer(PPOTrainer):
    """A trainer whose phases end in a `Phases`, as its seconds by phase do.

    The hooks of callbacks would not serve: with `ppo.reuse_update_values` the critic learns before `on_scores`.
    """

    phases: Phases | None = None

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        with super()._timed(phase):
            yield
        if self.phases is not None:
            self.phases.end(PARTS.get(phase, phase))


@contextlib.contextmanager
def count_compiled(counter: PhaseFlops) -> Iterator[None]:
    """Count the products and the attention of C++ kernels, which torch does not see. None has a window."""
    linear_rows, paged_attention, packed_attention = _C.linear_rows, stage.paged_attention, _C.packed_attention

    def counted_rows(dtype: str, wide: bool, addresses: tuple, sizes: tuple, threads: int) -> None:
        rows, columns, inner = sizes[:3]
        counter.add(PRODUCTS, 2 * rows * columns * inner)
        linear_rows(dtype, wide, addresses, sizes, threads)

    def counted_attention(q_TND: Tensor, keys: Tensor, *args: Tensor, row_starts: Tensor | None = None, **options):
        heads, width = q_TND.shape[1:]
        pairs = attended_tokens(args[2], row_starts)
        counter.add(ATTENTION, 4 * heads * width * pairs)
        return paged_attention(q_TND, keys, *args, row_starts=row_starts, **options)

    def counted_packed(
        dtype: str, tensors: tuple, strides: tuple, lengths: tuple, sizes: tuple, scale: float, threads: int
    ) -> None:
        sequences, heads, _, width, _ = sizes
        queries, keys = ((ctypes.c_int64 * sequences).from_address(address) for address in lengths)
        pairs = sum(n * n_keys - n * (n - 1) // 2 for n, n_keys in zip(queries, keys, strict=True))
        products = 5 if tensors[3] else 2  # backward forms the scores again
        counter.add(ATTENTION, 2 * products * heads * width * pairs)
        packed_attention(dtype, tensors, strides, lengths, sizes, scale, threads)

    _C.linear_rows, stage.paged_attention, _C.packed_attention = counted_rows, counted_attention, counted_packed
    try:
        yield
    finally:
        _C.linear_rows, stage.paged_attention, _C.packed_attention = linear_rows, paged_attention, packed_attention


def attended_tokens(lengths_S: Tensor, row_starts: Tensor | None) -> int:
    """Return the tokens that all rows of paged attention read, without a window.

    Row i of the n rows of a sequence reads length - (n - 1 - i) tokens.
    """
    lengths = lengths_S.tolist()
    if row_starts is None:
        return sum(lengths)
    rows = row_starts.diff().tolist()
    return sum(n * length - n * (n - 1) // 2 for n, length in zip(rows, lengths, strict=True) if length)


class Iterations:
    """icegrt's trainer on a workload, an iteration at a time. A context manager.

    Args:
        workload: what to run.
        dtype: "fp32" or "bf16".
        keys: overrides of the configuration.
        folder: of this process.
        run_folder: of the run, the same for all ranks.
    """

    def __init__(self, workload: Workload, dtype: str, keys: Sequence[str], folder: Path, run_folder: Path) -> None:
        base, actor, tokens = folder / "base.yaml", folder / "actor", tokenizer(workload)
        ppo_config(workload, run_folder, dtype).save(base)
        workload.actor().save_pretrained(actor)  # adapters need a checkpoint to belong to
        tokens.save_pretrained(actor)
        prompts = [{"prompt": text} for text in workload.prompt_texts()]
        self._prompt_tokens = workload.samples * sum(map(len, workload.prompt_ids()))
        self._phases = Phases()
        config = PPOConfig.load(base, keys)
        self._trainer = PhasedTrainer(config, actor, tokens, workload.reward_model(), prompts)
        self._trainer.phases = self._phases

    def __enter__(self) -> Iterations:
        self._trainer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._trainer.__exit__(*error)

    def step(self, counter: PhaseFlops | None = None) -> dict:
        """Run an iteration and return its figures."""
        self._phases.begin(counter)
        row = self._trainer.step()
        return {
            "phases": row.seconds_by_phase,
            "busy_phases": self._phases.busy_seconds,
            "answer_tokens": row.response_tokens,
            "tokens": self._prompt_tokens + row.response_tokens,
            "padding": row.padding_fraction,
        }

    def count(self) -> dict:
        """Run an iteration and return its operations beside its figures."""
        with PhaseFlops() as counter, count_compiled(counter):
            figures = self.step(counter)
        return figures | {"flops": counter.phases}


def main() -> None:
    """Serve iterations."""
    out = private_stdout()
    parser = worker_parser(__doc__)
    parser.add_argument("keys", nargs="*", help="overrides, such as ppo.minibatch_by=prompt")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_folder = Path(os.environ.get(RUN_FOLDER, folder)) / "run"
        with Iterations(options.workload, options.dtype, options.keys, folder, run_folder) as iterations:
            serve(iterations.step, out, iterations.count)


if __name__ == "__main__":
    main()
