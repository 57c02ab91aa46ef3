"""The base of the trainers: run folder, process groups, log, callbacks, checkpoints and iteration."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from typing_extensions import Self

from icegrt.checkpoint.directory import read_state
from icegrt.checkpoint.manager import Checkpoints
from icegrt.config import PPOConfig, RewardConfig, RunConfig, SFTConfig, ValueConfig
from icegrt.config.loader import as_dict
from icegrt.data.tokenizer import save_tokenizer
from icegrt.data.types import Tokenizer
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.layout import Layout
from icegrt.errors import ConfigError, RunError, attach_note
from icegrt.metrics import PPOStep, RewardStep, RunLog, SFTStep, ValueStep, drop_rollouts
from icegrt.metrics.sinks import check_sinks
from icegrt.model.architecture import DTYPES
from icegrt.model.lora.model import AdaptedModel
from icegrt.report.page import write_run_report
from icegrt.roles.role import TrainableRole, check_inference_mode
from icegrt.roles.skip_guard import SkipGuard
from icegrt.training.adapters import adapter_document, check_resume
from icegrt.training.failed_run import StepBoundary, kept_note
from icegrt.training.profiling import StepProfiler
from icegrt.training.run_folder import RunLock, lock_run_folder, save_config
from icegrt.training.stop_signals import STOP_SIGNALS, capture_stop_signals
from icegrt.utils.console import is_main, print_info, progress, warn
from icegrt.utils.cpu import warn_of_slow_bf16
from icegrt.utils.files import write_text_atomic

ConfigT = TypeVar("ConfigT", bound=SFTConfig | RewardConfig | ValueConfig | PPOConfig)
StepT = TypeVar("StepT", bound=SFTStep | RewardStep | ValueStep | PPOStep)


class Trainer(Generic[ConfigT, StepT]):
    """Iterate it for typed metrics, or `train()` to the end. Close it, or use `with`, to release the process groups.

    A subclass builds its models and data in `_set_up`, which receives the inputs of its constructor.

    Attributes:
        config: the section of the stage.
        dir: the run's folder.
        cluster: process groups, rank and device.
        tokenizer: of the model that is trained.
        roles: those that train, in the order of the checkpoint; `write_model` writes the first.
        unit, length_key: name of a step in messages, and the key that sets the number of steps.
        done_steps, total_steps: steps taken, and steps of the run. A callback may lower `total_steps`.
        chunk_rows: logit chunk size, the same in a whole run; None without a language model.
    """

    unit = "steps"
    length_key = "epochs"
    total_steps: int
    tokenizer: Tokenizer
    roles: list[TrainableRole]
    _skip_guard: SkipGuard

    def __init__(self, config: ConfigT, callbacks: Sequence[object] = (), *, inputs: Any) -> None:
        self.config = config
        self.run: RunConfig = config.run
        self.callbacks = list(callbacks)
        self.dtype = DTYPES[self.run.dtype]
        self.done_steps = 0
        self.chunk_rows: int | None = None
        self._log: RunLog | None = None
        self._saved_at: int | None = None
        self._written_at: int | None = None
        self._boundary: StepBoundary | None = None
        self._run_lock: RunLock | None = None
        self._report_is_missing = False
        self._stop_signal: Callable[[], int] = lambda: 0
        check_sinks(self.run.log_to, f"{config.section}.run.log_to")
        if not self.run.dir:
            raise ConfigError(f"{self.config.section}.run.dir is empty; name a folder for the run")
        # Absolute: a reward function or a callback may change the working directory.
        self.dir = Path(os.path.abspath(self.run.dir))
        check_inference_mode()
        with contextlib.ExitStack() as resources, torch.enable_grad():
            self._resources = resources
            self._open_run(resources, inputs)
            self._set_up(inputs)
            self._restore_and_open_log()
            self._evaluate_at_start()
            self._resources = resources.pop_all()

    def _open_run(self, resources: contextlib.ExitStack, inputs: Any) -> None:
        """Lock the run's folder, open the cluster, and choose the checkpoint to resume from."""
        layout = Layout.of(self.config.parallel)
        is_resume = False
        if is_main():
            # Rows in memory are no files of an earlier run.
            sources = [value for value in vars(inputs).values() if not isinstance(value, list)]
            self._run_lock = lock_run_folder(self.config, sources)
            resources.callback(self._run_lock.release)
            is_resume = self._run_lock.is_resume
        self.cluster = resources.enter_context(Cluster.open(layout))
        resources.callback(self._close_log)
        warn_of_slow_bf16(self.dtype, self.cluster.device, f"{self.config.section}.run.dtype")
        self._profiler = StepProfiler(self.config.profile, self.config.section, self.cluster, self.dir, self.unit)
        resources.callback(self._profiler.close)
        self._is_resume: bool = self.cluster.broadcast_from_main(is_resume)
        background = self.run.checkpoint_in_background
        self.checkpoints = Checkpoints(
            self.cluster,
            self.dir,
            self.config.keep_checkpoints,
            background=torch.cuda.is_available() if background == "auto" else background,
        )
        self._resumed_from = self._choose_checkpoint() if self._is_resume else None
        resumed = read_state(self._resumed_from) if self._resumed_from is not None else {}
        self._resumed_chunk_rows: int | None = resumed.get("chunk_rows")
        resources.push(self._complete_checkpoint_on_exit)
        resources.push(self._write_report_on_failure)
        resources.push(self._save_on_failure)

    def _set_up(self, inputs: Any) -> None:
        """Build models and data; set `total_steps`, `tokenizer` and `roles`."""
        raise NotImplementedError

    def _evaluate_at_start(self) -> None:
        """Evaluate before the first step, unless a resumed run has done so."""

    # -- opening and closing ---------------------------------------------------------------------------------------

    def _choose_checkpoint(self) -> Path | None:
        path = self.checkpoints.latest_valid()
        if path is not None:
            stage = read_state(path).get("stage")
            if stage != self.config.section:
                raise RunError(f"{self.dir}: holds a run of `icegrt {stage}`; resume it with that command")
        return path

    def _restore_and_open_log(self) -> None:
        """Restore the checkpoint into models and data, write the configuration, and open the log."""
        if self._resumed_from is not None:
            check_resume(self._resumed_from, self.roles, self.config.section)
            state = self.checkpoints.load(self._resumed_from, self.roles)
            self.done_steps = self._saved_at = self._written_at = state["step"]
            self.load_state(state["trainer"])
            print_info(f"resumed from {self._resumed_from}: {self.done_steps} of {self.total_steps} {self.unit} done")
            if self.done_steps > self.total_steps:
                key = f"{self.config.section}.{self.length_key}"
                warn(f"all {self.total_steps} {self.unit} of this configuration are done; raise {key} to train on")
        if self.cluster.is_main:
            # Before the first step there is at most an evaluation, which is repeated.
            resume_from_step = (self.done_steps or -1) if self._is_resume else None
            # The log comes first: if a logger cannot start, no file of the run is written yet.
            self._log = RunLog(self.dir, resume_from_step, log_to=self.run.log_to, config=as_dict(self.config))
            save_config(self.config, self.dir)
            assert self._run_lock is not None  # rank 0 holds it
            self._run_lock.begin()
            save_tokenizer(self.tokenizer, self.dir / "tokenizer")
            drop_rollouts(self.dir, after=self.done_steps)
        if self.chunk_rows:
            print_info(f"logit chunk size: {self.chunk_rows} rows (chunk_rows; fixed for this run)")

    def close(self, error: BaseException | None = None) -> None:
        """Complete a pending checkpoint, close the log, and release the process groups and the run's folder.

        Closing twice does nothing. A folder created for a run that never began is removed.

        Args:
            error: the exception that ends the run on this rank. Other ranks may be gone then, so a pending checkpoint
                is not completed. `with` passes it.
        """
        self._resources.__exit__(type(error) if error is not None else None, error, None)

    def _complete_checkpoint_on_exit(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None or (self.cluster.world_size == 1 and not isinstance(error, KeyboardInterrupt)):
            self.checkpoints.finish_pending()

    def _write_report_on_failure(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and not isinstance(error, KeyboardInterrupt) and self._log is not None and self.done_steps:
            self.write_report()

    def _save_on_failure(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Save the last whole step if a failure has left it in memory, and attach to the error what is kept."""
        boundary = self._boundary
        if not isinstance(error, Exception) or boundary is None:
            return
        # Other ranks may be gone; weights beside skipped steps are those that led there; a failed write fails again.
        can_save = self.cluster.world_size == 1 and not any(self._skip_guard.skipped_in_a_row.values())
        if boundary.step not in (0, self._written_at) and can_save and boundary.is_in_memory(self.roles):
            try:
                self._write_checkpoint(boundary.step, None, boundary.document())
                self.complete_checkpoint()
            except Exception as problem:  # the error that ends the run is the one to report
                warn(f"the last {self.unit[:-1]} is not saved: {problem}")
        attach_note(error, kept_note(self.config.section, self.dir, boundary.step, self.total_steps, self.unit))

    def _close_log(self) -> None:
        log, self._log = self._log, None
        if log is not None:
            log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.close(error)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs beside weights and optimizers, as JSON."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore `state()`."""

    def save_checkpoint(self, quality: float | None = None) -> Path:
        """Write a checkpoint now; `complete_checkpoint` waits for one in the background. Collective.

        Args:
            quality: of the model on held-out data; higher is better. The best checkpoint is never pruned.

        Returns:
            The folder of the checkpoint.
        """
        return self._write_checkpoint(self.done_steps, quality, {})

    def _write_checkpoint(self, step: int, quality: float | None, replaced: dict[str, Any]) -> Path:
        """Write the checkpoint of `step`; `replaced` takes the place of present state. Collective."""
        roles = {
            r.name: {
                "head": r.model.head_kind,
                "hf_config": r.model.architecture.hf_config,
                "generation_config": r.model.architecture.generation_config,
                "adapter": adapter_document(r.model),
                "frozen": list(r.model.frozen),
            }
            for r in self.roles
        }
        self._written_at = step
        if self._log is not None:
            self._log.sync()
        document: dict[str, Any] = {"stage": self.config.section, "roles": roles, "trainer": self.state()}
        if self.chunk_rows is not None:
            document["chunk_rows"] = self.chunk_rows
        path = self.checkpoints.save(
            step, self.roles, document | replaced, quality, lambda path: self.notify("on_checkpoint", path)
        )
        self._saved_at = step
        return path

    def complete_checkpoint(self) -> None:
        """Wait until a pending checkpoint is complete on the disk. Collective."""
        self.checkpoints.finish_pending()

    # -- running ---------------------------------------------------------------------------------------------------

    def step(self) -> StepT:
        """Take one step. Returns its metrics, which are logged."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[StepT]:
        while self.done_steps < self.total_steps:
            self.cluster.enter_phase(f"{self.config.section} after {self.done_steps} {self.unit}")
            number = self.done_steps + 1
            with self._profiler.step(number, lambda: self.done_steps >= self.total_steps):
                row = self.step()
            yield row
            self._between_steps()

    def train(self) -> dict[str, Any]:
        """Run to the end with a progress bar. Returns the result of `finish()`.

        SIGTERM, SIGINT (Ctrl-C), SIGHUP or SIGUSR1 to any rank ends the run on all ranks after the current step: a
        checkpoint is saved, and `SystemExit` with status 0 is raised. A second signal ends the process at once.
        """
        with capture_stop_signals() as self._stop_signal:
            with progress(self.total_steps, self.config.section, self.unit) as bar:
                bar.advance(self.done_steps)
                for step in self:
                    bar.advance(1, **self.describe(step))
            summary = self.finish()
            self.complete_checkpoint()
        return summary

    def _between_steps(self) -> None:
        received = [self._stop_signal() == number for number in STOP_SIGNALS]
        *stop, writing = self.cluster.any_rank([*received, not self.checkpoints.ready])
        if any(stop):
            if self._saved_at != self.done_steps:
                self.save_checkpoint()
            self.complete_checkpoint()
            name, progress_text = STOP_SIGNALS[stop.index(True)].name, f"{self.done_steps} of {self.total_steps}"
            print_info(f"{name}: saved after {progress_text} {self.unit}; continue with --resume")
            raise SystemExit(0)
        if not writing:
            self.complete_checkpoint()

    def describe(self, step: StepT) -> dict[str, float]:
        """Return the figures of a step for the progress line."""
        raise NotImplementedError

    def write_model(self, extra_files: dict[str, Any] | None = None) -> None:
        """Write the trained model to `<run.dir>/model`, in place of one from before a resume. Collective.

        An adapter is merged there, and written to `<run.dir>/adapter` too.

        Raises:
            RunError: a weight is not finite.
        """
        role = self.roles[0]
        role.save_pretrained(self.dir / "model", self.run.dtype, self.tokenizer, extra_files, replace=True)
        if isinstance(role.model, AdaptedModel):
            role.save_adapter(self.dir / "adapter", extra_files, replace=True)
        self.cluster.barrier()

    def save_pretrained(self, out: str | Path) -> Path:
        """Write the trained model as a Hugging Face checkpoint."""
        raise NotImplementedError

    def finish(self) -> dict[str, Any]:
        """Evaluate, save and export after the last step. Returns the summary."""
        raise NotImplementedError

    def write_report(self) -> None:
        """Write the report of the run so far, on rank 0. A failure is one warning: the metrics are on the disk."""
        if self.cluster.is_main:
            try:
                write_run_report(self.dir, config=self.config if isinstance(self.config, PPOConfig) else None)
                self._report_is_missing = False
            except Exception as error:
                if not self._report_is_missing:
                    command = f"`icegrt report {self.run.dir}` writes it"
                    warn(f"{self.dir / 'report.html'}: not written ({error}); the run goes on, and {command}")
                self._report_is_missing = True

    def notify(self, hook: str, *args: Any) -> None:
        """Call `hook` of every callback that defines it."""
        for callback in self.callbacks:
            method = getattr(callback, hook, None)
            if method is not None:
                method(self, *args)

    def _begin_step(self) -> None:
        """Record the state that a failure of this step shall leave."""
        self._boundary = StepBoundary.before_step(self.done_steps, self.roles, self.state())

    def log(self, row: Any) -> None:
        """Write a row of metrics; it is the same on all ranks, and rank 0 writes. It makes a step whole."""
        if self._boundary is not None:
            self._boundary = StepBoundary.after_step(self.done_steps, self.roles)
        if self._log is not None:
            self._log.log(row)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write an indented JSON file on rank 0."""
    if is_main():
        write_text_atomic(path, json.dumps(document, indent=2) + "\n")
