"""Bad configurations: each is one error that names the file and line, or the key, and what to do."""

import importlib.util

import pytest

from tests.helpers import stage_cases as cases

FIND_SPEC = importlib.util.find_spec
GOOD = "ppo:\n  actor: a\n  prompts: p.jsonl\n"

FILES = {
    "an unknown key": ("ppo:\n  kl_coeff: 0.1\n", [":2: ", "ppo.kl_coeff is not a key", "did you mean ppo.kl_coef?"]),
    "a key of another section": ("ppo:\n  lr: 1e-5\n", [":2: ", "did you mean ppo.optimizer.lr"]),
    "an unknown key below": ("ppo:\n  optimizer:\n    learn: 1\n", [":3: ", "ppo.optimizer.learn is not a key"]),
    "an unknown key of a list": (
        "ppo:\n  reward:\n    sources:\n      - {fucntion: 'a.py:f'}\n",
        [":4: ", "ppo.reward.sources[0].fucntion", "did you mean ppo.reward.sources[0].function?"],
    ),
    "an unknown section": ("pppo:\n  kl_coef: 1\n", [":1: ", "`pppo` is not a section", "did you mean ppo?"]),
    "no section": ("kl_coef: 1\n", [":1: ", "put it under `ppo:`"]),
    "another section only": ("sft:\n  epochs: 1\n", ["has no section `ppo:`", "it has sft"]),
    "text for a number": ("ppo:\n  gamma: much\n", [":2: ", "ppo.gamma", "'much' (text)", "a number"]),
    "a number for text": ("ppo:\n  actor: 7\n", [":2: ", "ppo.actor", "put it in quotes"]),
    "a boolean for a number": ("ppo:\n  iterations: true\n", [":2: ", "true (boolean)", "a whole number"]),
    "a fraction for a whole number": ("ppo:\n  iterations: 1.5\n", [":2: ", "1.5 (number)", "a whole number"]),
    "a list for a number": ("ppo:\n  gamma: [1]\n", [":2: ", "ppo.gamma", "(list)"]),
    "a number for a section": ("ppo:\n  critic: 3\n", [":2: ", "ppo.critic", "a mapping with the keys"]),
    "text for a list": ("ppo:\n  ptx_data: a.jsonl\n", [":2: ", "ppo.ptx_data", "a list of"]),
    "none of the choices": ("ppo:\n  kl_in: both\n", [":2: ", "ppo.kl_in", "one of reward, loss"]),
    "out of bounds": ("ppo:\n  gamma: 1.5\n", [":2: ", "ppo.gamma", "<= 1"]),
    "negative": ("ppo:\n  reward: {workers: -1}\n", [":2: ", "ppo.reward.workers", ">= 0"]),
    "not finite": ("ppo:\n  kl_coef: .nan\n", [":2: ", "ppo.kl_coef", "nan (number)"]),
    "a key twice": ("ppo:\n  gamma: 1\n  gamma: 0.9\n", [":3: ", "the key `gamma` is given twice"]),
    "a section twice": (GOOD + "ppo:\n  gamma: 1\n", [":4: ", "the key `ppo` is given twice"]),
    "a tab": ("ppo:\n\tgamma: 1\n", [":2: ", "not valid YAML"]),
    "an open bracket": ("ppo:\n  ptx_data: [a\n  gamma: 1\n", [":3: ", "not valid YAML"]),
    "wrong indentation": ("ppo:\n  gamma: 1\n    lam: 1\n", [":3: ", "not valid YAML"]),
    "a Python object": ("ppo:\n  actor: !!python/object/apply:os.system [ls]\n", [":2: ", "not valid YAML"]),
    "a list": ("- ppo\n", ["got a list, expected sections"]),
    "empty": ("", ["is empty", "under `ppo:`"]),
    "hidden before": ("ppo:\n  reward_function: http://<redacted>@h/\n", [":2: ", "it was hidden", "give it again"]),
}


@pytest.mark.parametrize("text, words", FILES.values(), ids=FILES)
def test_a_file(refused, tmp_path, text, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    refused(["ppo", str(path)], path, *words)


def test_a_file_that_is_missing_or_no_text(refused, tmp_path):
    (tmp_path / "recipe.yaml").write_text(GOOD)
    (tmp_path / "latin.yaml").write_bytes(b"ppo:\n  actor: caf\xe9\n")
    (tmp_path / "folder.yaml").mkdir()
    refused(["ppo", f"{tmp_path}/recip.yaml"], "no configuration file", f"did you mean {tmp_path}/recipe.yaml?")
    refused(["ppo", f"{tmp_path}/latin.yaml"], "latin.yaml is not UTF-8 text")
    refused(["ppo", f"{tmp_path}/folder.yaml"], "cannot read", "folder.yaml")


ARGUMENTS = {
    "no section": (["kl_coef=0.1"], ["`kl_coef` does not start with its section", "ppo.kl_coef"]),
    "another command's section": (["sft.epochs=1"], ["sft.epochs", "is not for this command, which reads `ppo`"]),
    "an unknown key": (["ppo.kl_ceof=0.1"], ["command line: ", "did you mean ppo.kl_coef?"]),
    "a key below a value": (["ppo.gamma.x=1"], ["ppo.gamma has no keys of its own"]),
    "a section": (["ppo=1"], ["`ppo` is a section"]),
    "no value": (["ppo.gamma"], ["`ppo.gamma` has no value", "ppo.gamma=VALUE"]),
    "nothing for a number": (["ppo.gamma="], ["ppo.gamma", "nothing"]),
    "broken YAML": (["ppo.ptx_data=[{path: a"], ["ppo.ptx_data", "not valid YAML"]),
    "an option for a key": (["--ppo.gamma=1"], ["keys are set without dashes: ppo.gamma=1"]),
    "an unknown option": (["--resum"], ["did you mean --resume?"]),
    "two files": (["a.yaml", "b.yaml"], ["two configuration files"]),
    "no file and no key": (["something"], ["neither a configuration file nor ppo.key=VALUE"]),
    "several": (["ppo.gamma=2", "ppo.lam=x"], ["2 problems", "ppo.gamma", "ppo.lam"]),
}


@pytest.mark.parametrize("arguments, words", ARGUMENTS.values(), ids=ARGUMENTS)
def test_a_command_line(refused, arguments, words):
    refused(["ppo", *arguments], *words)


def test_an_unknown_command(refused):
    refused(["pop"], "`pop` is not a command", "did you mean `icegrt ppo`?")


CONFLICTS = {
    "truncated sampling": (["ppo.sampling.top_k=5"], ["ppo.sampling.top_k", "Set top_k=0"]),
    "greedy sampling": (["ppo.sampling.temperature=0"], ["ppo.sampling.temperature must be above 0"]),
    "no room for an answer": (["ppo.sampling.max_new_tokens=64"], ["max_new_tokens 64", "context is 64"]),
    "reuse with several epochs": (["ppo.reuse_update_logprob=true"], ["ppo.ppo_epochs=1 and ppo.minibatches=1"]),
    "values of a second minibatch": (
        ["ppo.reuse_update_values=true", "ppo.minibatches=2"],
        ["ppo.reuse_update_values needs ppo.minibatches=1, not 2", "or ppo.reuse_update_values=false"],
    ),
    "dis with reuse": (
        ["ppo.correction=dis", "ppo.reuse_update_logprob=true", "ppo.ppo_epochs=1", "ppo.minibatches=1"],
        ["ppo.correction=dis", "Set ppo.reuse_update_logprob=false"],
    ),
    "dis with dual clip": (["ppo.correction=dis", "ppo.dual_clip=2"], ["ppo.dual_clip must be empty"]),
    "the rollout's log-probs beside inference": (["ppo.kl_logprobs=rollout"], ["Set ppo.kl_logprobs=inference"]),
    "the rollout's log-probs with tis": (
        [
            "ppo.kl_logprobs=rollout",
            "ppo.correction=tis",
            "ppo.reuse_update_logprob=true",
            "ppo.ppo_epochs=1",
            "ppo.minibatches=1",
        ],
        ["which ppo.correction=tis and several optimizer steps", "Set ppo.kl_logprobs=inference"],
    ),
    "a buffer beyond the length": (
        ["ppo.overlong_buffer=9", "ppo.sampling.max_new_tokens=8"],
        ["ppo.overlong_buffer is 9", "max_new_tokens=8", "Set it to 8 at most"],
    ),
    "right answers without a function": (
        ["ppo.positive_nll_coef=0.1", "ppo.reward_function="],
        ["ppo.positive_nll_coef needs a reward function", "Set ppo.positive_nll_score=total"],
    ),
    "ptx without data": (["ppo.ptx_coef=1"], ["ppo.ptx_data names no file"]),
    "too many minibatches": (["ppo.minibatches=100"], ["ppo.minibatches is 100", "8 responses"]),
    "too short a horizon": (
        ["ppo.kl_control=adaptive", "ppo.kl_horizon_responses=1"],
        ["ppo.kl_horizon_responses is 1", "Set it above 8"],
    ),
    "nothing pays": (
        ["ppo.reward_model=", "ppo.reward_function=", "ppo.critic.init=actor"],
        ["no reward: set ppo.reward_model, ppo.reward_function", "ppo.reward.sources"],
    ),
    "a critic from nothing": (["ppo.reward_model="], ["ppo.critic.init", "no reward model"]),
    "missing prompts": (["ppo.prompts=gone.jsonl"], ["gone.jsonl: no such file"]),
    "no prompts": (["ppo.prompts="], ["ppo.prompts is empty"]),
    "a missing model": (["ppo.actor=gone"], ["gone", "config.json"]),
    "an unknown logger": (["ppo.run.log_to=wandbb"], ["ppo.run.log_to: `wandbb`", "did you mean wandb?"]),
    "a logger that is not installed": (
        ["ppo.run.log_to=mlflow"],
        ["ppo.run.log_to names mlflow, which is not installed: pip install mlflow"],
    ),
    "a logger twice": (["ppo.run.log_to=[mlflow, mlflow]"], ["ppo.run.log_to"]),
}


@pytest.mark.parametrize("keys, words", CONFLICTS.values(), ids=CONFLICTS)
def test_keys_that_contradict_each_other_or_the_machine(home, refused, run_dir, monkeypatch, keys, words):
    monkeypatch.setattr("importlib.util.find_spec", _without_mlflow)
    refused(["ppo", *cases.ppo_keys(home, run_dir, *keys)], *words)


def _without_mlflow(name, package=None):
    return None if name == "mlflow" else FIND_SPEC(name, package)


def test_places_that_cannot_be_written_or_hold_something(home, refused, run_dir, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run", "/proc/icegrt"):
        refused(["ppo", *cases.ppo_keys(home, path)], path)
    run_dir.mkdir(parents=True)
    (run_dir / "notes.txt").write_text("mine")
    refused(["ppo", *cases.ppo_keys(home, run_dir)], run_dir, "not empty, and not the folder of a run")
    refused(["ppo", *cases.ppo_keys(home, tmp_path / "gone"), "--resume"], "no checkpoint to resume from")


@pytest.mark.parametrize(
    "argument",
    ["ppo.hub_token=hunter2", "--api_key=hunter2", "ppo.reward.http.token_env.password=hunter2", "password=hunter2"],
)
def test_a_secret_that_is_mistyped_is_not_printed(refused, argument):
    assert "hunter2" not in refused(["ppo", argument])


def test_a_password_in_a_url_is_not_printed(home, refused, run_dir):
    source = "ppo.reward.sources=[{url: 'http://me:hunter2@[oops'}]"
    assert "hunter2" not in refused(["ppo", *cases.ppo_keys(home, run_dir, source)], "ppo.reward.sources[0]", "URL")
