"""What a study file must have before anything runs: every mistake names its key, and nothing is written."""

import hashlib

import pytest

from icegrt import cli
from icegrt.config.loader import as_yaml
from icegrt.errors import ConfigError
from icegrt.study.checks import check
from icegrt.study.grid import grid, input_files, pilot_tasks, preparation
from tests.helpers.refusals import check_refused
from tests.helpers.studies import STUDY, study_of

PLAIN, MORE = STUDY["settings"][:2]


def contrast(**changes):
    return [STUDY["contrasts"][0] | changes]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": {}}, "study.base: neither is given; set either command or recipe"),
        ({"base": {"command": "python a.py {out} {seed}", "recipe": "r.yaml"}}, "study.base: both are given"),
        ({"base": {"command": "python a.py {out}"}}, "study.base.command: has no {seed}"),
        ({"base": {"command": "python a.py {out} {seed} {run}"}}, "{run} is not a placeholder; they are {out}"),
        ({"base": {"command": "python 'a.py {out} {seed}"}}, "which is no command line (No closing quotation)"),
        ({"base": {"command": "a {out} {seed} {shared}"}}, "study.base.prepare: not given, and {shared} is its folder"),
        ({"base": {"command": "a {out} {seed}", "prepare": "b"}}, "study.base.prepare: has no {shared}"),
        (
            {"base": {"command": "a {out} {seed}"}, "settings": [PLAIN, MORE | {"ranks": 2}]},
            "settings[1].ranks: 2 ranks",
        ),
        ({"settings": []}, "study.settings: there is none"),
        ({"settings": [PLAIN, PLAIN, MORE]}, "study.settings: two are named 'plain'"),
        ({"settings": [PLAIN, MORE, {"name": "../x"}]}, "study.settings[2].name: got '../x'"),
        ({"measures": [{"name": "score"}]}, "study.measures[0].field: not given"),
        ({"seeds": [3]}, "study.seeds: got [3]; an interval needs at least two"),
        ({"seeds": [3, 3, 4]}, "study.seeds: 3 is given twice"),
        ({"pilot": {"setting": "plain", "seeds": [2, 100]}}, "study.pilot.seeds: [2] are seeds of the study"),
        ({"pilot": {"setting": "plain", "seeds": [100]}}, "a standard deviation needs at least two"),
        ({"pilot": {"setting": "plan", "seeds": [100, 101]}}, "study.pilot.setting: got 'plan', expected one of plain"),
        ({"pilot": {"seeds": [100, 101]}}, "study.pilot.setting: not given"),
        ({"contrasts": contrast(a="moer")}, "study.contrasts[0].a: got 'moer', expected one of plain, more, same"),
        ({"contrasts": contrast(a="plain")}, "study.contrasts[0]: a and b are one setting"),
        ({"contrasts": contrast(measure="kl")}, "study.contrasts[0].measure: got 'kl', expected one of score"),
        ({"contrasts": contrast(expected="equal")}, "study.contrasts[0].margin: got 0; expected=equal needs"),
        ({"contrasts": contrast(margin=0.1)}, "study.contrasts[0].margin: got 0.1; expected=equal needs"),
    ],
)
def test_a_mistake_is_refused_with_its_key(tmp_path, changes, words):
    changes = {"pilot": {}} | changes if "settings" in changes else changes
    with pytest.raises(ConfigError) as error:
        check(study_of(tmp_path, **changes))
    assert words in str(error.value)


def test_all_mistakes_are_listed_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"2 problems in the study") as error:
        check(study_of(tmp_path, seeds=[1], contrasts=contrast(b="x")))
    assert "study.seeds" in str(error.value) and "contrasts[0].b" in str(error.value)


def test_the_command_refuses_before_it_writes(tmp_path, capfd):
    path = tmp_path / "study.yaml"
    path.write_text(as_yaml(study_of(tmp_path, seeds=[1])), encoding="utf-8")
    check_refused(capfd, tmp_path, ["study", str(path)], "study.seeds: got [1]")
    path.write_text(path.read_text().replace("expected: lower", "expected: les"), encoding="utf-8")
    check_refused(capfd, tmp_path, ["study", str(path)], "study.yaml:", "contrasts[1].expected", "one of higher, lower")
    check_refused(capfd, tmp_path, ["study", "--ammend"], "did you mean --amend?")


def test_report_of_a_study_that_never_began_is_refused(tmp_path, capfd):
    path = tmp_path / "study.yaml"
    path.write_text(as_yaml(study_of(tmp_path)), encoding="utf-8")
    check_refused(capfd, tmp_path, ["study", str(path), "--report"], "no study has begun there")


def test_a_recipe_is_checked_with_the_overrides_of_every_setting(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("ppo: {kl_coef: 0.1}\n", encoding="utf-8")
    settings = [PLAIN, {"name": "more", "overrides": ["ppo.kl_ceof=0"]}, STUDY["settings"][2] | {"overrides": []}]
    with pytest.raises(ConfigError, match=r"study.settings\[1\] \(more\): .*did you mean ppo.kl_coef"):
        check(study_of(tmp_path, base={"recipe": str(recipe)}, settings=settings))


def test_runs_go_seed_by_seed_and_know_folder_seed_and_overrides(tmp_path):
    recipe = {"recipe": "r.yaml", "overrides": ["ppo.actor={shared}/model"], "prepare": "python p.py {shared} {seed}"}
    config = study_of(tmp_path, base=recipe, settings=[PLAIN, MORE | {"ranks": 2}], pilot=STUDY["pilot"])
    tasks = grid(config, {})
    assert [(t.setting, t.seed) for t in tasks[:3]] == [("plain", 0), ("more", 0), ("plain", 1)]
    study = tmp_path / "study"
    assert tasks[0].command[1:] == (
        *("-m", "icegrt", "ppo", "r.yaml", f"ppo.actor={study}/shared/seed_0/run/model"),
        *(f"ppo.run.dir={study}/runs/plain/seed_0/run", "ppo.run.seed=0", "ppo.run.resume=auto"),
    )
    assert tasks[1].command[1:6] == ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert "gain=2" in tasks[1].command
    assert pilot_tasks(config, {})[0].folder == study / "pilot" / "plain" / "seed_100"
    (prepare,) = preparation(config, {}, [7])
    assert prepare.command[1:] == ("p.py", f"{study}/shared/seed_7/run", "7")


def test_a_fingerprint_changes_with_command_files_ranks_and_threads_but_not_with_the_folder(tmp_path):
    first = grid(study_of(tmp_path), {})
    assert len({task.fingerprint for task in first}) == len(first)
    for changes in ({"threads": 2}, {"base": {"command": "python b.py {out} {seed}"}}):
        assert not {t.fingerprint for t in first} & {t.fingerprint for t in grid(study_of(tmp_path, **changes), {})}
    assert [t.fingerprint for t in grid(study_of(tmp_path, dir="elsewhere"), {})] == [t.fingerprint for t in first]
    assert grid(study_of(tmp_path), {"a": "hash"})[0].fingerprint != first[0].fingerprint


def test_help_lists_the_options(capsys):
    assert cli.main(["study", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--amend", "--pilot", "--report", "--retry-failed", "study.contrasts[].a"))


def test_the_files_of_commands_and_overrides_are_hashed(tmp_path):
    for name in ("run.py", "prepare.py", "reward.py", "other"):
        (tmp_path / name).write_text(name)
    base = {
        "command": f"python {tmp_path}/run.py {{out}} {{seed}} {tmp_path}/missing.py",
        "prepare": f"python {tmp_path}/prepare.py {{shared}}",
        "overrides": [f"reward={tmp_path}/reward.py:score"],
    }
    files = input_files(study_of(tmp_path, base=base, settings=[PLAIN | {"overrides": [f"x={tmp_path}/other"]}]))
    assert list(files) == [str(tmp_path / name) for name in ("other", "prepare.py", "reward.py", "run.py")]
    assert files[str(tmp_path / "other")] == hashlib.sha256(b"other").hexdigest()
