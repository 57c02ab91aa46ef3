"""wandb and mlflow: chosen by one key, given the same names as every other sink, and never worth a run."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest

import icegrt
from icegrt import cli
from icegrt.errors import ConfigError
from icegrt.metrics import RunLog, SFTStep, read_metrics
from icegrt.metrics.sinks import MlflowSink, check_sinks
from tests.helpers import stage_cases as cases

STEP = SFTStep(step=1, epoch=0.1, loss=2.0, tokens=7, tokens_per_second=1.0, lr=0.0, grad_norm=1.0)


class FakeWandb(types.ModuleType):
    """Records what is called: `calls` of (name, arguments)."""

    def __init__(self):
        super().__init__("wandb")
        self.calls, self.broken, self.refuses = [], False, False
        self.Settings = dict

    def init(self, **settings):
        if self.refuses:
            (Path(settings["dir"]) / "wandb").mkdir()
            raise RuntimeError("no API key configured.\n  Use login. Authorization: Bearer hunter2hunter2")
        self.calls.append(("init", settings))
        self.id = settings.get("id") or "made-up-id"
        return self

    def log(self, scalars, step):
        if self.broken:
            raise ConnectionError("no route to api, Authorization: Bearer hunter2hunter2")
        self.calls.append(("log", scalars, step))

    def finish(self):
        self.calls.append(("finish",))


class FakeMlflow:
    """The few classes of mlflow that are used; `calls` of a client that is made anew each time."""

    def __init__(self, monkeypatch):
        self.calls, fake = [], self

        class Client:
            def get_experiment_by_name(self, name):
                return None

            def create_experiment(self, name):
                fake.calls.append(("experiment", name))
                return "7"

            def create_run(self, experiment, run_name):
                fake.calls.append(("run", experiment, run_name))
                return types.SimpleNamespace(info=types.SimpleNamespace(run_id="run-1"))

            def log_param(self, run, name, value):
                fake.calls.append(("param", run, name, value))

            def log_batch(self, run, metrics):
                fake.calls.append(("log", run, {m[0]: m[1] for m in metrics}, {m[3] for m in metrics}))

            def set_terminated(self, run):
                fake.calls.append(("end", run))

        modules = {
            "mlflow": {},
            "mlflow.entities": {"Metric": lambda *a: a},
            "mlflow.tracking": {"MlflowClient": Client},
        }
        for name, members in modules.items():
            module = types.ModuleType(name)
            vars(module).update(members)
            monkeypatch.setitem(sys.modules, name, module)

    def of(self, name):
        return [call[1:] for call in self.calls if call[0] == name]


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


@pytest.fixture
def mlflow(monkeypatch):
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return FakeMlflow(monkeypatch)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return cases.make_home(tmp_path_factory.mktemp("home"))


def flat(row):
    """A row of metrics.jsonl under the names that sinks use."""

    def walk(prefix, values):
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(key if key == "evaluation" else f"{prefix}/{key}", value)
            elif isinstance(value, (int, float)) and key not in ("iteration", "step"):
                yield f"{prefix}/{key}", float(value)

    return dict(walk(row["kind"], {k: v for k, v in row.items() if k != "kind"}))


def test_a_ppo_run_gives_every_sink_the_same_names_and_numbers(home, tmp_path, wandb, mlflow):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    keys = cases.ppo_keys(home, run, "ppo.run.log_to=[wandb, mlflow]", f"ppo.eval_prompts={home.prompts}")
    keys += ["ppo.reward.sources=[{function: '" + home.function + "', name: again, weight: 0}]"]
    config = icegrt.PPOConfig.load(None, keys)
    with icegrt.PPOTrainer(config) as trainer:
        list(trainer)
    rows = read_metrics(run)
    expected = [(flat(row), row["iteration"]) for row in rows]
    assert [call[1:] for call in wandb.calls if call[0] == "log"] == expected
    assert [(scalars, *steps) for _, scalars, steps in mlflow.of("log")] == expected
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {name for scalars, _ in expected for name in scalars}
    assert {"ppo/sources/again/score_mean", "ppo/sources/reward_model/score_std", "evaluation/score_mean"} <= set(
        events.Tags()["scalars"]
    )
    assert wandb.calls[-1] == ("finish",) and mlflow.of("end") == [("run-1",)]


def test_a_logger_gets_the_configuration_without_secrets(tmp_path, wandb, mlflow):
    config = {"actor": "a", "reward": {"url": "http://<redacted>@h/", "workers": 2}}
    with RunLog(tmp_path / "my run", tensorboard=False, log_to=["wandb", "mlflow"], config=config) as log:
        log.log(STEP)
    settings = wandb.calls[0][1]
    assert settings["config"] == config and settings["name"] == "my run" and settings["project"] == "icegrt"
    assert mlflow.of("run") == [("7", "my run")]
    assert mlflow.of("param") == [
        ("run-1", "actor", "a"),
        ("run-1", "reward.url", "http://<redacted>@h/"),
        ("run-1", "reward.workers", "2"),
    ]


def test_a_trainer_hands_over_what_is_redacted(home, tmp_path, wandb):
    config = icegrt.SFTConfig.load(None, cases.sft_keys(home, tmp_path / "run", "sft.run.log_to=wandb"))
    with icegrt.SFTTrainer(config) as trainer:
        assert trainer.step().step == 1
    assert wandb.calls[0][1]["config"]["run"]["log_to"] == ["wandb"]


def test_mlflow_gets_names_that_it_takes(tmp_path, mlflow):
    MlflowSink("run", tmp_path, {}, "run-1").write({"ppo/sources/f/metrics/acc@1 (é)_mean": 3.0}, 2)
    assert mlflow.of("log") == [("run-1", {"ppo/sources/f/metrics/acc_1 _é__mean": 3.0}, {2})]


def test_a_resumed_run_goes_on_in_the_loggers_run(tmp_path, wandb, mlflow):
    with RunLog(tmp_path, tensorboard=False, log_to=["wandb", "mlflow"]) as log:
        log.log(STEP)
    assert json.loads((tmp_path / "loggers.json").read_text()) == {"wandb": "made-up-id", "mlflow": "run-1"}
    with RunLog(tmp_path, 1, tensorboard=False, log_to=["wandb", "mlflow"], config={"a": 1}) as log:
        log.log(SFTStep(step=2, epoch=0.2, loss=1.0, tokens=7, tokens_per_second=1.0, lr=0.0, grad_norm=1.0))
    again = [call[1] for call in wandb.calls if call[0] == "init"][1]
    assert again["id"] == "made-up-id" and again["resume"] == "allow"
    assert len(mlflow.of("run")) == 1 and mlflow.of("param") == []  # an mlflow run's parameters cannot change


def test_a_logger_that_fails_costs_its_own_rows_only(tmp_path, wandb, capsys):
    wandb.broken = True
    with RunLog(tmp_path, tensorboard=False, log_to=["wandb"]) as log:
        log.log(STEP)
        log.log(SFTStep(step=2, epoch=0.2, loss=1.0, tokens=7, tokens_per_second=1.0, lr=0.0, grad_norm=1.0))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    said = capsys.readouterr().err
    assert said.count("wandb gets no more metrics (ConnectionError: no route") == 1 and "hunter2" not in said


def test_a_logger_that_cannot_start_is_refused_and_leaves_nothing(home, tmp_path, wandb, mlflow, capsys):
    wandb.refuses = True
    keys = cases.sft_keys(home, tmp_path / "new" / "run", "sft.run.log_to=[mlflow, wandb]")
    assert cli.main(["sft", *keys]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning:")]
    assert len(said) == 1 and said[0].startswith("error: run.log_to: wandb cannot be started (RuntimeError: no API key")
    assert "hunter2" not in said[0] and "or remove it" in said[0]
    assert mlflow.of("end") and not (tmp_path / "new").exists()


def test_loggers_are_checked_before_anything_is_done(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for names, words in (
        (["wandbb"], "sft.run.log_to: `wandbb` is not a logger; did you mean wandb"),
        (["x"], "expected any of wandb, mlflow"),
        (["mlflow"], "sft.run.log_to names mlflow, which is not installed: pip install mlflow"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_sinks(names, "sft.run.log_to")
        assert words in str(caught.value)
    check_sinks([], "sft.run.log_to")


def test_mlflow_itself_takes_what_it_is_given(tmp_path, monkeypatch):
    client = pytest.importorskip("mlflow.tracking").MlflowClient
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a store of files needs no data base to be installed
    with RunLog(tmp_path / "run", tensorboard=False, log_to=["mlflow"], config={"a": {"b": 1}}) as log:
        log.log(STEP)
    run = client().get_run(json.loads((tmp_path / "run" / "loggers.json").read_text())["mlflow"])
    assert run.data.metrics["sft/loss"] == 2.0 and run.data.params == {"a.b": "1"}
    sink = MlflowSink("again", tmp_path, {}, run.info.run_id)
    sink.write({"ppo/sources/f/metrics/acc@1 (é)_mean": 3.0}, 2)
    assert client().get_run(run.info.run_id).data.metrics["ppo/sources/f/metrics/acc_1 _é__mean"] == 3.0


def test_wandb_itself_takes_what_it_is_given_and_not_the_command_line(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(sys, "argv", ["icegrt", "ppo", "url=http://me:hunter2hunter2@host/"])
    for step in (1, 2):
        with RunLog(tmp_path, step - 1 or None, tensorboard=False, log_to=["wandb"], config={"a": {"b": 17}}) as log:
            log.log(SFTStep(step=step, epoch=0.1, loss=2.0, tokens=7, tokens_per_second=1.0, lr=0.0, grad_norm=1.0))
    run = json.loads((tmp_path / "loggers.json").read_text())["wandb"]
    written = b"".join(path.read_bytes() for path in tmp_path.rglob(f"run-{run}.wandb"))
    assert written.count(b"sft/loss") >= 2 and b"hunter2" not in written
