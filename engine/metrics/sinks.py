"""Loggers besides `metrics.jsonl` and TensorBoard: wandb and mlflow, by `run.log_to`, if they are installed.

All sinks get the same names: `KIND/FIELD`, nested fields with further slashes (`ppo/score_mean`,
`ppo/sources/checker/score_mean`, `evaluation/score_mean`), at the step or iteration of the row. WANDB_PROJECT and
MLFLOW_EXPERIMENT_NAME name the projects; the default is icegrt. `loggers.json` in the run's folder keeps the id of the
logger's run, so that a resumed run continues it.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from icegrt.errors import ConfigError
from icegrt.utils.console import warn
from icegrt.utils.files import write_text_atomic
from icegrt.utils.redaction import redact_text
from icegrt.utils.values import flatten

_PROJECT = "icegrt"
_IDS_FILE = "loggers.json"
_MAX_PARAM_LENGTH = 500  # mlflow refuses longer values of parameters
# mlflow refuses a batch of metrics if one name has another character, such as acc@1 of a reward function: replace it.
_NOT_IN_MLFLOW = re.compile(r"[^\w.\- :/]")


class Sink(Protocol):
    """A logger of scalars by name."""

    name: str

    def write(self, scalars: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def check_sinks(names: Sequence[str], key: str) -> None:
    """Check the names of loggers.

    Raises:
        ConfigError: a logger is unknown, named twice or not installed; it names `key`.
    """
    for name in names:
        if name not in _SINKS:
            nearest = difflib.get_close_matches(name, _SINKS, 1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"expected any of {', '.join(_SINKS)}"
            raise ConfigError(f"{key}: `{name}` is not a logger; {hint}")
        if list(names).count(name) > 1:
            raise ConfigError(f"{key}: {name} is named twice")
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            raise ConfigError(f"{key} names {name}, which is not installed: pip install {name}, or remove it")


def open_sinks(names: Sequence[str], folder: Path, config: Mapping[str, Any], resume: bool) -> list[Sink]:
    """Open the loggers.

    Args:
        names: see `check_sinks`.
        folder: the run's folder.
        config: the resolved configuration, with secrets hidden.
        resume: continue the loggers' runs of `loggers.json`.

    Raises:
        ConfigError: a logger cannot start, for example without a login or a server. Folders created by it are removed.
    """
    path = folder / _IDS_FILE
    ids = _ids(path) if resume and path.is_file() else {}
    paths_before = set(folder.iterdir())
    sinks: list[Sink] = []
    try:
        for name in names:
            sinks.append(_GuardedSink(_SINKS[name](folder.resolve().name, folder, config, ids.get(name))))
    except Exception as error:
        for sink in sinks:
            sink.close()
        for created in set(folder.iterdir()) - paths_before:
            shutil.rmtree(created, ignore_errors=True)
        reason = redact_text(" ".join(f"{type(error).__name__}: {error}".split())[:400])
        raise ConfigError(f"run.log_to: {name} cannot be started ({reason}); set it up, or remove it") from error
    if sinks:
        write_text_atomic(path, json.dumps({sink.name: sink.id for sink in sinks}))
    return sinks


def _ids(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); remove it to start new runs of the loggers") from None


class WandbSink:
    """A run of Weights & Biases."""

    name = "wandb"

    def __init__(self, run: str, folder: Path, config: Mapping[str, Any], id: str | None) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", _PROJECT)
        resume = {"id": id, "resume": "allow"} if id else {}
        # wandb records the command line, which may hold secrets, among its metadata: turn the metadata off.
        settings = wandb.Settings(x_disable_meta=True)
        self._run = wandb.init(
            project=project, name=run, dir=str(folder), config=dict(config), settings=settings, **resume
        )
        self.id = self._run.id

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowSink:
    """A run of MLflow, through a separate client, which does not change the active run of a notebook."""

    name = "mlflow"

    def __init__(self, run: str, folder: Path, config: Mapping[str, Any], id: str | None) -> None:
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        self._client, self._metric = MlflowClient(), Metric
        self.id = id
        if id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
            experiment = self._client.get_experiment_by_name(name)
            id_ = experiment.experiment_id if experiment is not None else self._client.create_experiment(name)
            self.id = self._client.create_run(id_, run_name=run).info.run_id
            for name, value in flatten(config):
                self._client.log_param(self.id, name, str(value)[:_MAX_PARAM_LENGTH])

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(_NOT_IN_MLFLOW.sub("_", name), value, now, step) for name, value in scalars.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self.id)


class _GuardedSink:
    """A sink that does not end the run if it fails: it warns once and ignores later rows."""

    def __init__(self, sink: Any) -> None:
        self._sink, self.name, self.id = sink, sink.name, sink.id
        self._failed = False

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        self._guard(lambda: self._sink.write(scalars, step))

    def close(self) -> None:
        self._guard(self._sink.close)

    def _guard(self, action: Any) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:
            self._failed = True
            reason = redact_text(f"{type(error).__name__}: {error}")
            warn(f"{self.name} gets no more metrics ({reason}); metrics.jsonl and TensorBoard do")


_SINKS: dict[str, type] = {"wandb": WandbSink, "mlflow": MlflowSink}
