"""Loggers beside `metrics.jsonl` and TensorBoard: wandb and mlflow, by `run.log_to`, if they are installed.

All sinks get the same names: `KIND/FIELD`, nested fields with further slashes (`ppo/score_mean`,
`ppo/sources/checker/score_mean`, `evaluation/score_mean`), at the step or iteration of the row.
The projects are named by WANDB_PROJECT and MLFLOW_EXPERIMENT_NAME; icegrt where those are not set. A resumed run goes
on in the logger's own run, whose id stands in `loggers.json` in the run's folder.
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
from icegrt.utils.redaction import redact_text

_PROJECT = "icegrt"
_IDS_FILE = "loggers.json"
# mlflow refuses longer values of parameters.
_LONGEST_PARAM = 500
# It refuses a whole batch for one letter; a reward function may call its metric acc@1.
_NOT_IN_MLFLOW = re.compile(r"[^\w.\- :/]")


class Sink(Protocol):
    """Takes scalars of a step, by their full names."""

    name: str

    def write(self, scalars: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def check_sinks(names: Sequence[str], key: str) -> None:
    """Refuse loggers that are unknown, named twice or not installed. Raises `ConfigError` naming `key`."""
    for name in names:
        if name not in _SINKS:
            near = difflib.get_close_matches(name, _SINKS, 1)
            hint = f"did you mean {near[0]}?" if near else f"expected any of {', '.join(_SINKS)}"
            raise ConfigError(f"{key}: `{name}` is not a logger; {hint}")
        if list(names).count(name) > 1:
            raise ConfigError(f"{key}: {name} is named twice")
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            raise ConfigError(f"{key} names {name}, which is not installed: pip install {name}, or leave it out")


def open_sinks(names: Sequence[str], folder: Path, config: Mapping[str, Any], resume: bool) -> list[Sink]:
    """Open the loggers. config: the resolved configuration, secrets hidden already.

    Raises `ConfigError` for one that cannot start, such as for want of a login or a server; `folder` is then as it was.
    """
    path = folder / _IDS_FILE
    ids = _ids(path) if resume and path.is_file() else {}
    before = set(folder.iterdir())
    sinks: list[Sink] = []
    try:
        for name in names:
            sinks.append(_Guarded(_SINKS[name](folder.resolve().name, folder, config, ids.get(name))))
    except Exception as error:
        for sink in sinks:
            sink.close()
        for made in set(folder.iterdir()) - before:
            shutil.rmtree(made, ignore_errors=True)
        what = redact_text(" ".join(f"{type(error).__name__}: {error}".split())[:400])
        raise ConfigError(f"run.log_to: {name} cannot be started ({what}); set it up, or leave it out") from error
    if sinks:
        path.write_text(json.dumps({sink.name: sink.id for sink in sinks}), encoding="utf-8")
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
        how = {"id": id, "resume": "allow"} if id else {}
        # What wandb finds out by itself includes the command line, secrets in it and all.
        settings = wandb.Settings(x_disable_meta=True)
        self._run = wandb.init(
            project=project, name=run, dir=str(folder), config=dict(config), settings=settings, **how
        )
        self.id = self._run.id

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowSink:
    """A run of MLflow, through a client of its own: a run that is active in a notebook stays as it is."""

    name = "mlflow"

    def __init__(self, run: str, folder: Path, config: Mapping[str, Any], id: str | None) -> None:
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        self._client, self._metric = MlflowClient(), Metric
        self.id = id
        if id is None:
            experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
            found = self._client.get_experiment_by_name(experiment)
            where = found.experiment_id if found is not None else self._client.create_experiment(experiment)
            self.id = self._client.create_run(where, run_name=run).info.run_id
            for name, value in _flat(config):
                self._client.log_param(self.id, name, str(value)[:_LONGEST_PARAM])

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(_NOT_IN_MLFLOW.sub("_", name), value, now, step) for name, value in scalars.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self.id)


class _Guarded:
    """A sink whose failures cost its own rows and not the run: it warns once and takes no more."""

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
            what = redact_text(f"{type(error).__name__}: {error}")
            warn(f"{self.name} takes no more metrics ({what}); metrics.jsonl and TensorBoard go on")


_SINKS: dict[str, type] = {"wandb": WandbSink, "mlflow": MlflowSink}


def _flat(config: Mapping[str, Any], prefix: str = ""):
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
