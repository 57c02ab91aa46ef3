"""The command line: what runs, what is printed, and the exit status of every way to end."""

import os
import subprocess
import sys
import types

import pytest

from icegrt import cli
from icegrt.config import SECTIONS, PPOConfig
from icegrt.config.introspect import config_keys
from icegrt.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "ICEGRT_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def stages(monkeypatch):
    """Puts in the place of every stage one that notes its configuration, or raises what `stages.error` holds."""
    recorder = types.SimpleNamespace(runs=[], error=None)

    def stage(name):
        def run(config):
            recorder.runs.append((name, config))
            if recorder.error is not None:
                raise recorder.error

        return run

    for name in SECTIONS:
        module = types.ModuleType(cli.STAGE_MODULES[name])
        module.run = stage(name)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return recorder


def shell(*args, **env):
    command = [sys.executable, "-m", "icegrt", *args]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=60)


@pytest.mark.parametrize("name", SECTIONS)
def test_every_command_runs_its_stage_with_its_configuration(name, stages):
    assert cli.main([name]) == 0
    assert stages.runs == [(name, SECTIONS[name]())]


def test_file_overrides_and_options_come_in_any_order(tmp_path, stages):
    path = tmp_path / "a=b.yaml"
    path.write_text("ppo:\n  gamma: 0.5\n")
    for args in (["ppo.kl_coef=0.1", "--resume", str(path)], [str(path), "ppo.kl_coef=0.1", "--resume"]):
        assert cli.main(["ppo", *args]) == 0
        config = stages.runs.pop()[1]
        assert (config.gamma, config.kl_coef, config.run.resume) == (0.5, 0.1, True)


def test_resume_wins_over_the_file(tmp_path, stages):
    path = tmp_path / "r.yaml"
    path.write_text("ppo:\n  run: {resume: false}\n")
    assert cli.main(["ppo", str(path), "--resume"]) == 0
    assert stages.runs[0][1].run.resume is True


def test_print_config_prints_what_would_run_and_runs_nothing(tmp_path, stages, capsys):
    assert cli.main(["ppo", "ppo.kl_coef=1e-3", "--print-config"]) == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert PPOConfig.load(path) == PPOConfig.load(None, ["ppo.kl_coef=1e-3"])
    assert stages.runs == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["pp"], "`pp` is not a command; did you mean `icegrt ppo`?"),
        (["xyz"], "the commands are sft, sample"),
        (["ppo", "--resum"], "did you mean --resume?"),
        (["sample", "--resume"], "`--resume` is not an option of `icegrt sample`"),
        (["ppo", "--kl_coef=0.1"], "keys are set without dashes: ppo.kl_coef=0.1"),
        (["ppo", "--ppo.kl_coef", "0.1"], "keys are set without dashes: ppo.kl_coef=VALUE"),
        (["ppo", "ppo.kl_coef"], "`ppo.kl_coef` has no value; write ppo.kl_coef=VALUE"),
        (["ppo", "kl_coef=1"], "did you mean ppo.kl_coef?"),
        (["ppo", "ppo.kl_ceof=1"], "did you mean ppo.kl_coef?"),
        (["ppo", "recipe"], "`recipe` is neither a configuration file nor ppo.key=VALUE; see the usage"),
        (["ppo", "a.yaml", "b.yaml"], "two configuration files, a.yaml and b.yaml"),
        (["ppo", "no-such.yaml"], "no configuration file no-such.yaml"),
        (["doctor", "a.yaml"], "`icegrt doctor` takes no `a.yaml`"),
        (["doctor", "--jsn"], "did you mean --json?"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_status_2(args, words, capsys, stages):
    assert cli.main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and words in err and err.count("\n") == 1
    assert stages.runs == []


def test_user_errors_of_a_stage_have_no_traceback_unless_asked_for(stages, capsys, monkeypatch):
    stages.error = DataError("a.jsonl:3: no prompt \x1b[31m")
    assert cli.main(["sft"]) == 2
    assert capsys.readouterr().err == "error: a.jsonl:3: no prompt \n"
    monkeypatch.setenv("ICEGRT_DEBUG", "1")
    with pytest.raises(DataError):
        cli.main(["sft"])


def test_other_errors_keep_their_traceback(stages):
    stages.error = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        cli.main(["sft"])


def test_interrupting_says_how_to_resume(stages, capsys, monkeypatch):
    stages.error = KeyboardInterrupt()
    assert cli.main(["ppo", "ppo.run.dir=a b"]) == 130
    assert capsys.readouterr().err == (
        "interrupted; to continue, from the last checkpoint if there is one, run: icegrt ppo 'ppo.run.dir=a b' "
        "ppo.run.resume=auto\n"
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["ppo", "--resume"]) == 130
    assert "the same torchrun command with: icegrt ppo ppo.run.resume=auto\n" in capsys.readouterr().err
    assert cli.main(["sample"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_of_many_ranks_one_speaks_and_says_which_it_is(stages, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(cli.failure, "should_report", lambda error: isinstance(error, DataError))
    stages.error = ConfigError("another rank says it")
    assert cli.main(["sft"]) == 2
    stages.error = ValueError("another rank's failure, seen from here")
    assert cli.main(["sft"]) == 1
    assert capsys.readouterr().err == ""
    stages.error = DataError("only here")
    assert cli.main(["sft"]) == 2
    assert capsys.readouterr().err == "[rank 3] error: only here\n"


@pytest.mark.parametrize("missing", ["megatron.core", "transformers"])
def test_a_missing_package_is_a_message_that_says_what_to_install(missing, monkeypatch, capsys):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(cli.importlib, "import_module", absent)
    assert cli.main(["sft"]) == 2
    assert "pip install 'icegrt[engine]'" in capsys.readouterr().err


def test_a_missing_module_of_our_own_is_a_bug_and_keeps_its_traceback(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(cli.importlib, "import_module", absent)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["sft"])


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_lists_every_command_with_an_example(args, capsys):
    assert cli.main(args) == 0
    out = capsys.readouterr().out
    assert all(f"  {name.ljust(8)}  {text}" in out for name, text in cli.COMMANDS.items())
    assert "icegrt ppo recipe.yaml ppo.kl_coef=0.1" in out


@pytest.mark.parametrize("name", SECTIONS)
def test_help_of_a_command_has_every_key_and_option(name, capsys, stages):
    assert cli.main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"{row.name}: {row.type} = {row.default}" in out for row in config_keys(SECTIONS[name]))
    assert ("--resume" in out) == (name in cli.RESUMABLE)
    assert stages.runs == []


def test_commands_are_the_stages_and_those_without_a_configuration():
    assert list(cli.COMMANDS) == [*SECTIONS, "report", "rehearse", "plan", "migrate", "data", "doctor"]


def test_exit_codes_of_the_process():
    version = shell("--version")
    assert version.returncode == 0 and version.stdout.startswith("icegrt ")
    process = shell("ppo", "ppo.kl_ceof=1")
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr == "error: command line: ppo.kl_ceof is not a key; did you mean ppo.kl_coef?\n"
    debug = shell("ppo", "ppo.kl_ceof=1", ICEGRT_DEBUG="1")
    assert debug.returncode == 1 and "Traceback" in debug.stderr


def test_help_imports_no_torch_and_the_overview_not_even_the_configuration():
    code = (
        "import sys; from icegrt.cli import main\n"
        "assert main(['--help']) == 0 and not {'pydantic', 'yaml', 'torch', 'rich'} & set(sys.modules)\n"
        "assert main(['ppo', '--help']) == 0 and main(['ppo', '--print-config']) == 0 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_reader_that_stops_reading_is_no_error():
    command = f"{sys.executable} -m icegrt ppo --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
