"""What the three trainers share: the run's folder, the process groups, the log, callbacks and iteration."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from icegrt.checkpoint import manager as checkpoint
from icegrt.checkpoint.directory import read_state
from icegrt.config import RunConfig
from icegrt.config.loader import as_dict
from icegrt.data import check_tokenizer, load_tokenizer
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.layout import Layout
from icegrt.errors import ConfigError, RunError
from icegrt.kernels import default_chunk_rows
from icegrt.metrics import RunLog, drop_rollouts
from icegrt.metrics.sinks import check_sinks
from icegrt.model.architecture import DTYPES, Architecture
from icegrt.roles.role import Role
from icegrt.training.run_folder import CONFIG_FILE, RunLock, lock_run_folder
from icegrt.training.sigterm import capture_sigterm
from icegrt.utils.console import is_main, print_info, progress
from icegrt.utils.files import write_text_aside


class Callback:
    """Hooks into a run; override what is needed. Each is called on every rank, after the fact."""

    def on_rollout(self, trainer: Any, responses: list) -> None:
        """Responses of an iteration have been sampled."""

    def on_scores(self, trainer: Any, experience: Any) -> None:
        """Log-probs, values, scores and advantages of an iteration are known."""

    def on_update(self, trainer: Any, step: Any) -> None:
        """An iteration (or an optimizer step of SFT and reward training) is done; `step` is what it yields."""

    def on_checkpoint(self, trainer: Any, path: Path) -> None:
        """A checkpoint has been written to `path`."""


class Trainer:
    """Iterate it for typed metrics, or `train()` to the end. Close it (or use `with`) to leave torch as it was."""

    unit = "steps"
    total_steps: int
    roles: list[Role]  # those that learn, for checkpoints

    def __init__(self, config: Any, callbacks: Sequence[Any] = ()) -> None:
        self.config = config
        self.run: RunConfig = config.run
        self.callbacks = list(callbacks)
        self.dtype = DTYPES[self.run.dtype]
        self.done_steps = 0
        self._log: RunLog | None = None
        self._is_resume = False  # whether the folder is one that a run has used already
        self._resumed_from: Path | None = None
        self._saved_at: int | None = None
        self._run_lock: RunLock | None = None
        self._stop_requested: Callable[[], bool] = lambda: False
        self.checkpoints: checkpoint.Checkpoints | None = None
        self.cluster: Cluster | None = None
        check_sinks(self.run.log_to, f"{config.section}.run.log_to")
        if not self.run.dir:
            raise ConfigError(f"{self.config.section}.run.dir is empty; name a folder for the run")
        self.dir = Path(self.run.dir)
        layout = Layout.of(config.parallel)
        if is_main():
            self._run_lock = lock_run_folder(config)
        try:
            self.cluster = Cluster.open(layout)
            self._is_resume = self.cluster.broadcast_from_main(self._run_lock is not None and self._run_lock.is_resume)
            if self._is_resume:
                self._resumed_from = self._choose_checkpoint()
            background = self.run.checkpoint_in_background
            self.checkpoints = checkpoint.Checkpoints(
                self.dir,
                config.keep_checkpoints,
                background=torch.cuda.is_available() if background == "auto" else background,
            )
        except BaseException:
            self.close()
            raise

    # -- the run's folder ------------------------------------------------------------------------------------------

    def _choose_checkpoint(self) -> Path | None:
        found = checkpoint.latest_valid(self.dir)
        if found is not None:
            stage = read_state(found).get("stage")
            if stage != self.config.section:
                raise RunError(f"{self.dir}: holds a run of `icegrt {stage}`; resume it with that command")
        return found

    def _restore_and_open_log(self, tokenizer: Any, **saved: Any) -> None:
        """Once models and data stand: restore the checkpoint, write the configuration, open the log."""
        if self._resumed_from is not None:
            state = checkpoint.load(self._resumed_from, self.roles)
            self.done_steps = self._saved_at = state["step"]
            if saved.get("chunk_rows") and not self.config.chunk_rows:
                self.use_chunk_rows(state["chunk_rows"])
                saved["chunk_rows"] = self.chunk_rows
            self.load_state(state["trainer"])
            print_info(f"resumed from {self._resumed_from}: {self.done_steps} of {self.total_steps} {self.unit} done")
        if self.cluster.is_main:
            # Before the first step there is at most an evaluation, and that is made again.
            resumed = (self.done_steps or -1) if self._is_resume else None
            # First of all files: a logger that cannot start ends a run of which nothing is written yet.
            self._log = RunLog(self.dir, resumed, log_to=self.run.log_to, config=as_dict(self.config))
            self.config.save(self.dir / CONFIG_FILE)
            tokenizer.save_pretrained(self.dir / "tokenizer")
            drop_rollouts(self.dir, after=self.done_steps)
        self._saved = saved
        if saved.get("chunk_rows"):
            print_info(
                f"logits are formed {saved['chunk_rows']} rows at a time (chunk_rows), here and in every resumed run"
            )

    def use_chunk_rows(self, chunk_rows: int) -> None:
        """Takes a checkpoint's choice: other chunks would round differently from the run that is continued."""
        self.chunk_rows = chunk_rows

    # -- state that subclasses add ---------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything beside weights and optimizers that a resumed run needs, as JSON."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take `state()` back."""

    def save_checkpoint(self, quality: float | None = None) -> Path:
        """Write a checkpoint of everything now; `complete_checkpoint` waits for it where that is in the background.

        quality: how good the model is on held-out data, the higher the better; the best checkpoint is kept.
        """
        roles = {
            r.name: {
                "head": r.model.head_kind,
                "hf_config": r.model.architecture.hf_config,
                "generation_config": r.model.architecture.generation_config,
            }
            for r in self.roles
        }
        if self._log is not None:
            self._log.sync()
        document = {"stage": self.config.section, "roles": roles, "trainer": self.state(), **self._saved}
        path = self.checkpoints.save(
            self.done_steps, self.roles, document, quality, lambda path: self.notify("on_checkpoint", path)
        )
        self._saved_at = self.done_steps
        return path

    def complete_checkpoint(self) -> None:
        """Wait until the checkpoint that is being written is on the disk under its name."""
        self.checkpoints.complete()

    # -- running ---------------------------------------------------------------------------------------------------

    def step(self) -> Any:
        """One step; returns its metrics, which are logged already."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        while self.done_steps < self.total_steps:
            yield self.step()
            self._between_steps()

    def train(self) -> Any:
        """Run to the end with a progress bar; returns what `finish()` says.

        SIGTERM to any rank ends the run on all of them after the step that it meets: saved, and with exit status 0
        (`SystemExit`).
        """
        with capture_sigterm() as self._stop_requested:
            with progress(self.total_steps, self.config.section, self.unit) as bar:
                bar.advance(self.done_steps)
                for step in self:
                    bar.advance(1, **self.describe(step))
            summary = self.finish()
            self.complete_checkpoint()
        return summary

    def _between_steps(self) -> None:
        end, writing = self.cluster.any_rank([self._stop_requested(), not self.checkpoints.ready])
        if end:
            if self._saved_at != self.done_steps:
                self.save_checkpoint()
            self.complete_checkpoint()
            print_info(
                f"SIGTERM: saved after {self.done_steps} of {self.total_steps} {self.unit}; --resume goes on from there"
            )
            raise SystemExit(0)
        if not writing:
            self.complete_checkpoint()

    def describe(self, step: Any) -> dict[str, float]:
        """The figures of a step that its progress line shows."""
        return {"loss": step.loss}

    def write_model(self, *args: Any) -> None:
        """The model under `<run.dir>/model`, in place of one that was written before a resume."""
        model, aside = self.dir / "model", self.dir / "model.new"
        if self.cluster.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        self.save_pretrained(aside, *args)
        if self.cluster.is_main:
            shutil.rmtree(model, ignore_errors=True)
            aside.rename(model)
        self.cluster.wait()

    def save_pretrained(self, out: str | Path) -> Path:
        """Write the trained model as a Hugging Face checkpoint."""
        raise NotImplementedError

    def finish(self) -> Any:
        """After the last step: final evaluation, checkpoint, exported model."""

    def notify(self, hook: str, *args: Any) -> None:
        """Call `hook` of every callback that has it."""
        for callback in self.callbacks:
            method = getattr(callback, hook, None)
            if method is not None:
                method(self, *args)

    def log(self, row: Any) -> None:
        """Write a row of metrics; what every rank knows, rank 0 writes."""
        if self._log is not None:
            self._log.log(row)

    def close(self) -> None:
        """Close the log and leave the process groups; a folder made for a run that never began is removed."""
        checkpoints, self.checkpoints = self.checkpoints, None
        # After an error other ranks may be gone, and must not be waited for.
        orderly = sys.exc_info()[0] is None or (self.cluster is not None and self.cluster.world_size == 1)
        try:
            if checkpoints is not None and orderly:
                checkpoints.complete()
        finally:
            self._leave()

    def _leave(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None
        if self.cluster is not None:
            self.cluster.close()
            self.cluster = None
        if self._run_lock is not None:
            self._run_lock.release()
            self._run_lock = None

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def tokenizer_for(given: Any, model: Any, architecture: Architecture) -> Any:
    """The tokenizer: the given one, or the one beside the model; checked against the model's vocabulary."""
    if given is None or isinstance(given, (str, Path)):
        folder = given or (model if isinstance(model, (str, Path)) else None)
        if folder is None:
            raise ConfigError("a model in memory comes without a tokenizer; pass tokenizer=")
        tokenizer = load_tokenizer(str(folder), print_info=print_info)
    else:
        tokenizer = given
        check_tokenizer(tokenizer, print_info=print_info)
    if len(tokenizer) > architecture.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model's vocabulary only {architecture.vocab_size}; "
            "they do not belong together"
        )
    return tokenizer


def resolve_chunk_rows(configured: int, architecture: Architecture) -> int:
    """Rows of logits formed at once: the key, or what the vocabulary and free device memory allow, alike on all ranks.

    Asked once per run, when models and optimizers stand; a resumed run takes its checkpoint's (`use_chunk_rows`).
    """
    if configured:
        return configured
    if not torch.cuda.is_available():
        return default_chunk_rows(architecture.vocab_size)
    free = torch.tensor(torch.cuda.mem_get_info()[0], device="cuda")
    dist.all_reduce(free, op=dist.ReduceOp.MIN)
    return default_chunk_rows(architecture.vocab_size, "cuda", int(free))


def write_json(path: Path, document: dict[str, Any]) -> None:
    """A small JSON file, readable by people; written by rank 0."""
    if is_main():
        write_text_aside(path, json.dumps(document, indent=2) + "\n")
