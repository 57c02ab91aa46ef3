"""Bad input gets one clear error that names the file, line or key, before training, and leaves nothing behind."""

import json

import pytest

from tests.helpers import stage_cases as cases
from tests.helpers import tiny_models


@pytest.fixture
def refused(refused):
    """`refused(command, keys, *words)`: the command with these keys is refused."""
    return lambda command, keys, *words: refused([command, *keys], *words)


# -- data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "hi"', ["not JSON"]),
        ("[1, 2]", ["JSON object", "a list"]),
        ('{"prompt": ""}', ["`prompt`", "empty"]),
        ('{"prompt": 7}', ["`prompt`", "int"]),
        ('{"question": "hi"}', ["columns found: `question`", "`prompt`"]),
        ('{"messages": [{"role": "boss", "content": "x"}]}', ["messages[0].role", "boss"]),
        (json.dumps({"prompt": "long " * 20}), ["context 64 - max_new_tokens 8 leaves 56"]),
    ],
    ids=["malformed", "no object", "empty", "no text", "no prompt", "role", "too long"],
)
def test_a_bad_line_of_prompts_is_named_with_its_file(home, refused, run_dir, tmp_path, line, words):
    path = cases.write_jsonl(tmp_path / "bad.jsonl", ['{"prompt": "fine"}', line])
    refused("ppo", cases.ppo_keys(home, run_dir, f"ppo.prompts={path}"), f"{path}:2", *words)


@pytest.mark.parametrize(
    ("command", "key", "row", "words"),
    [
        ("sft", "sft.data", {"prompt": "a"}, ["`prompt` and `response`"]),
        ("sft", "sft.data", {"prompt": "a", "response": " "}, ["`response`", "empty"]),
        ("sft", "sft.heldout", {"prompt": "a", "response": "b" * 90}, ["max_length is 64"]),
        ("reward", "reward.data", {"prompt": "a", "responses": ["x"], "scores": [1]}, ["at least 2"]),
        ("reward", "reward.data", {"prompt": "a", "responses": ["x", "y"], "scores": [1]}, ["1 entries for 2"]),
        ("reward", "reward.data", {"prompt": "a", "responses": ["x", "y"], "scores": [1, None]}, ["`scores[1]`"]),
        ("reward", "reward.data", {"prompt": "a", "chosen": "x"}, ["`chosen` and `rejected`"]),
    ],
)
def test_a_bad_training_row_is_named(home, refused, run_dir, tmp_path, command, key, row, words):
    path = cases.write_jsonl(tmp_path / "bad.jsonl", [row])
    keys = cases.sft_keys if command == "sft" else cases.reward_keys
    refused(command, keys(home, run_dir, f"{key}=[{{path: {path}}}]"), f"{path}:1", *words)


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_data_file(home, refused, run_dir, tmp_path, text):
    (tmp_path / "empty.jsonl").write_text(text)
    refused("ppo", cases.ppo_keys(home, run_dir, f"ppo.prompts={tmp_path}/empty.jsonl"), "empty.jsonl: no rows")
    refused("sft", cases.sft_keys(home, run_dir, f"sft.data=[{{path: {tmp_path}/empty.jsonl}}]"), "no rows")


def test_a_missing_data_file(home, refused, run_dir):
    refused("ppo", cases.ppo_keys(home, run_dir, "ppo.prompts=nowhere.jsonl"), "nowhere.jsonl: no such file")
    refused("sft", cases.sft_keys(home, run_dir, "sft.data=[]"), "sft.data names no file")


# -- configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("ppo.kl_coeff=0.1", ["ppo.kl_coeff is not a key", "did you mean ppo.kl_coef?"]),
        ("ppo.sampling.top_p=0.9", ["ppo.sampling.top_p", "top_p=1"]),
        ("ppo.sampling.temperature=0", ["ppo.sampling.temperature", "greedy"]),
        ("ppo.reward_model=", ["ppo.critic.init", "no reward model"]),
        ("ppo.token_budget=20", ["ppo.token_budget is 20", "prompts.jsonl:"]),
        ("ppo.sampling.max_new_tokens=64", ["max_new_tokens 64", "context is 64"]),
        ("ppo.reuse_update_logprob=true", ["ppo.reuse_update_logprob", "ppo.ppo_epochs=1"]),
        ("ppo.ptx_coef=0.5", ["ppo.ptx_coef", "ppo.ptx_data"]),
        ("ppo.minibatches=99", ["ppo.minibatches is 99", "8 responses"]),
        ("ppo.prompts=", ["ppo.prompts is empty"]),
        ("ppo.actor=", ["ppo.actor is empty"]),
        ("ppo.run.dir=", ["ppo.run.dir is empty"]),
    ],
)
def test_keys_that_cannot_be(home, refused, run_dir, key, words):
    refused("ppo", cases.ppo_keys(home, run_dir, key), *words)


def test_no_reward_at_all(home, refused, run_dir):
    keys = cases.ppo_keys(home, run_dir, "ppo.reward_model=", "ppo.reward_function=", "ppo.critic.init=actor")
    refused("ppo", keys, "ppo.reward_model, ppo.reward_function, or both")


def test_a_token_budget_below_the_longest_row(home, refused, run_dir):
    refused("sft", cases.sft_keys(home, run_dir, "sft.token_budget=16"), "sft.jsonl:", "sft.token_budget 16")
    refused("reward", cases.reward_keys(home, run_dir, "reward.token_budget=16"), "rankings.jsonl:", "token_budget 16")


# -- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "key"),
    [("ppo", "ppo.actor"), ("ppo", "ppo.reward_model"), ("sft", "sft.model"), ("reward", "reward.model")],
)
def test_a_model_that_is_missing_or_no_checkpoint(home, refused, run_dir, tmp_path, command, key):
    keys = {"ppo": cases.ppo_keys, "sft": cases.sft_keys, "reward": cases.reward_keys}[command]
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "folder", "nowhere"):
        refused(command, keys(home, run_dir, f"{key}={path}"), path, "config.json")


@pytest.mark.parametrize("command", ["sample", "generate"])
def test_sampling_from_what_is_no_checkpoint(home, refused, tmp_path, command):
    keys = [f"{command}.prompts={home.prompts}", f"{command}.out={tmp_path}/new/out.jsonl"]
    refused(command, [*keys, f"{command}.model=nowhere"], "nowhere", "config.json")


def test_weights_that_are_cut_short_or_missing(home, refused, run_dir, tmp_path):
    folder = tmp_path / "cut"
    cases.save_model(folder, tiny_models.causal_lm(), tiny_models.tokenizer())
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused("ppo", cases.ppo_keys(home, run_dir, f"ppo.actor={folder}"), "model.safetensors", "safetensors")
    (folder / "model.safetensors").unlink()
    refused("sft", cases.sft_keys(home, run_dir, f"sft.model={folder}"), folder, "no model.safetensors")


def test_a_language_model_in_place_of_a_reward_model(home, refused, run_dir):
    keys = cases.ppo_keys(home, run_dir, f"ppo.reward_model={home.actor}")
    refused("ppo", keys, home.actor, "no value head", "icegrt reward")


def test_roles_of_different_vocabularies(home, refused, run_dir, tmp_path):
    reward_model = cases.save_model(tmp_path / "other", tiny_models.scorer(vocab_size=64))
    keys = cases.ppo_keys(home, run_dir, f"ppo.reward_model={reward_model}")
    refused("ppo", keys, "reward model", "64 tokens", "one of 61")


def test_a_tokenizer_larger_than_the_vocabulary(home, refused, run_dir, tmp_path):
    small = cases.save_model(tmp_path / "small", tiny_models.causal_lm(vocab_size=40), tiny_models.tokenizer())
    refused("sft", cases.sft_keys(home, run_dir, f"sft.model={small}"), "the tokenizer has", "only 40")
    keys = [f"sample.model={small}", f"sample.prompts={home.prompts}", f"sample.out={tmp_path}/out.jsonl"]
    refused("sample", keys, "the tokenizer has", "only 40")


def test_a_tokenizer_without_eos(home, refused, run_dir, tmp_path):
    tokenizer = tiny_models.tokenizer()
    tokenizer.eos_token = None
    folder = cases.save_model(tmp_path / "endless", tiny_models.causal_lm(), tokenizer)
    refused("ppo", cases.ppo_keys(home, run_dir, f"ppo.actor={folder}"), folder, "no EOS token", "eos_token")


# -- reward functions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return 1 / 0", ["raised ZeroDivisionError", "prompts.jsonl:"]),
        ("return [s.row['truth'] for s in samples]", ["raised KeyError: 'truth'", "prompts.jsonl:1"]),
        ("return [float('nan') for s in samples]", ["returned nan for", "prompts.jsonl:1"]),
        ("return [float('inf') for s in samples]", ["returned inf for", "prompts.jsonl:1"]),
        ("return [True for s in samples]", ["returned True for", "prompts.jsonl:1", "finite number"]),
        ("return [None for s in samples]", ["returned None for", "prompts.jsonl:1"]),
        ("return ['1' for s in samples]", ["returned '1' for", "prompts.jsonl:1"]),
        ("return [1.0]", ["returned 1 scores for 2 samples", "prompts.jsonl:1"]),
        ("return 1.0", ["returned 1.0 for 2 samples", "prompts.jsonl:1"]),
        ("pass", ["returned None for 2 samples", "prompts.jsonl:1"]),
    ],
)
def test_a_reward_function_that_fails_does_so_at_once(home, refused, run_dir, tmp_path, body, words):
    (tmp_path / "bad.py").write_text(f"def score(samples):\n    {body}\n")
    refused("ppo", cases.ppo_keys(home, run_dir, f"ppo.reward_function={tmp_path}/bad.py:score"), "`score`", *words)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nowhere.py:score", ["no file nowhere.py"]),
        ("score.py", ["file.py:function"]),
        ("{home}/score.py:nothing", ["has no function `nothing`"]),
        ("no_such_module:score", ["no_such_module", "ModuleNotFoundError"]),
    ],
)
def test_a_reward_function_that_is_not_there(home, refused, run_dir, spec, words):
    keys = cases.ppo_keys(home, run_dir, f"ppo.reward_function={spec.format(home=home.folder)}")
    refused("ppo", keys, *words)


# -- folders and processes ----------------------------------------------------------------------------------------


def test_places_that_cannot_be_written(home, refused, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run", "/proc/icegrt/run"):
        refused("ppo", cases.ppo_keys(home, path), path)
    for path, named in (
        (tmp_path / "file" / "x.jsonl", tmp_path / "file"),
        (tmp_path, "folder"),
        ("/proc/x", "/proc"),
    ):
        keys = [f"sample.model={home.actor}", f"sample.prompts={home.prompts}", f"sample.out={path}"]
        refused("sample", keys, named)
        refused("generate", [key.replace("sample.", "generate.", 1) for key in keys], named)


def test_a_folder_that_holds_something_is_not_touched(home, refused, run_dir):
    run_dir.mkdir(parents=True)
    (run_dir / "notes.txt").write_text("mine")
    refused("ppo", cases.ppo_keys(home, run_dir), run_dir, "not empty, and not the folder of a run", "ppo.run.dir")


def test_resuming_without_a_checkpoint(home, refused, run_dir):
    refused("ppo", [*cases.ppo_keys(home, run_dir), "--resume"], run_dir, "no checkpoint", "without --resume")
    refused("export", [f"export.run={run_dir}", f"export.out={run_dir}/out"], run_dir, "no checkpoint")


def test_an_empty_folder_of_the_users_stays(home, refused, run_dir):
    run_dir.mkdir(parents=True)
    refused("ppo", cases.ppo_keys(home, run_dir, "ppo.prompts=nowhere.jsonl"), "no such file")
    assert run_dir.is_dir()


def test_ranks_that_no_layout_fits_or_that_cannot_meet(home, refused, run_dir, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for command, keys in (("ppo", cases.ppo_keys(home, run_dir)), ("sft", cases.sft_keys(home, run_dir))):
        odd = [*keys, f"{command}.parallel.tensor=3"]
        refused(command, odd, "2 ranks", "tensor 3", "Start 3 ranks", "set parallel.tensor=2 parallel.pipeline=1")
        refused(command, keys, "2 ranks", "MASTER_ADDR", "torchrun --nproc-per-node 2")
