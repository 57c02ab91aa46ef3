"""`icegrt migrate trl` and docs/migrating.md: one table, exact values, reasons, and clear refusals."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from icegrt import cli
from icegrt.commands import migrate as command
from icegrt.config import PPOConfig
from icegrt.config.introspect import SECTIONS, config_keys
from icegrt.errors import ConfigError
from icegrt.migration import docs, trl
from icegrt.migration.table import migrate, read_settings
from icegrt.ppo.setup import check_config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "migrating.md"

# Fields of PPOConfig in TRL 1.0.0 and 1.10.0 beside those of TrainingArguments, with their defaults.
PPO_FIELDS = {
    "learning_rate": 3e-6, "dataset_num_proc": None, "num_mini_batches": 1, "total_episodes": None,
    "local_rollout_forward_batch_size": 64, "num_sample_generations": 10, "response_length": 53, "stop_token": None,
    "stop_token_id": None, "temperature": 0.7, "missing_eos_penalty": None, "world_size": None,
    "num_total_batches": None, "micro_batch_size": None, "local_batch_size": None, "batch_size": None,
    "local_mini_batch_size": None, "mini_batch_size": None, "push_to_hub": None, "model_adapter_name": None,
    "ref_adapter_name": None, "num_ppo_epochs": 4, "whiten_rewards": False, "kl_coef": 0.05, "kl_estimator": "k1",
    "cliprange": 0.2, "vf_coef": 0.1, "cliprange_value": 0.2, "gamma": 1.0, "lam": 0.95,
    "ds3_gather_for_generation": True, "logging_steps": 10, "gradient_checkpointing": True, "bf16": None,
}  # fmt: skip
MODEL_AND_SCRIPT_FIELDS = """
    sft_model_path reward_model_path dataset_name dataset_config dataset_train_split dataset_test_split
    dataset_streaming ignore_bias_buffers model_name_or_path model_revision dtype trust_remote_code
    attn_implementation use_peft lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters
    lora_modules_to_save lora_task_type use_rslora use_dora load_in_8bit load_in_4bit bnb_4bit_quant_type
    use_bnb_nested_quant bnb_4bit_quant_storage
"""
TLDR = """\
# the arguments of TRL's example on tl;dr
dataset_name: trl-lib/tldr
dataset_test_split: validation
learning_rate: 3e-6
output_dir: runs/tldr
per_device_train_batch_size: 16
gradient_accumulation_steps: 4
total_episodes: 1000000
model_name_or_path: models/base
sft_model_path: models/sft
reward_model_path: models/reward
local_rollout_forward_batch_size: 16
missing_eos_penalty: 1.0
stop_token: eos
eval_strategy: steps
eval_steps: 100
"""


def settings_of(tmp_path, text, name="config.yaml", **options):
    path = tmp_path / name
    path.write_text(text)
    return read_settings(path, trl.ROWS, trl.LIBRARY, **options)


def converted(tmp_path, text, **options):
    return migrate(trl.ROWS, settings_of(tmp_path, text, **options))


def run(capsys, *arguments):
    command.main([str(argument) for argument in arguments])
    return capsys.readouterr()


def test_the_example_of_trl_loads_and_passes_the_checks_of_a_run(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(TLDR)
    out = tmp_path / "ppo.yaml"
    report = run(capsys, "trl", tmp_path / "config.yaml", "--world-size", 8, "--out", out).out
    config = PPOConfig.load(out)
    check_config(config)
    assert (config.actor, config.reward_model, config.run.dir) == ("models/sft", "models/reward", "runs/tldr")
    assert (config.prompts_per_iteration, config.samples_per_prompt, config.minibatches) == (512, 1, 1)
    assert (config.iterations, config.eval_every) == (1954, 195)  # ceil(1,000,000 / 512); 1954 // 10
    assert (config.sampling.temperature, config.sampling.max_new_tokens, config.max_batch) == (0.7, 53, 16)
    assert (config.missing_eos_penalty, config.score_scale, config.score_clip) == (1.0, False, 0.0)
    assert config.optimizer == dataclasses.replace(config.critic.optimizer)
    assert (config.optimizer.lr, config.optimizer.beta2, config.optimizer.clip_grad) == (3e-6, 0.999, 0.0)
    assert (config.run.dtype, config.run.recompute, config.run.seed) == ("bf16", "none", 42)
    assert f"{tmp_path}/config.yaml:2: dataset_name=trl-lib/tldr" in report
    assert "still to set: ppo.prompts" in report


def test_json_of_trl_gives_the_same_as_yaml(tmp_path):
    values = {"output_dir": "runs/x", "total_episodes": 640, "stop_token": "<STOP_TOKEN>", "hub_token": "<HUB_TOKEN>"}
    as_json = migrate(trl.ROWS, settings_of(tmp_path, json.dumps(values, indent=2), "config.json"))
    as_yaml = converted(tmp_path, "output_dir: runs/x\ntotal_episodes: 640\nstop_token: eos\n")
    assert as_json.values == as_yaml.values
    assert as_json.missing == as_yaml.missing == []


@pytest.mark.parametrize(
    ("per_device", "accumulated", "minibatches", "steps"),
    [(1, 16, 4, 1), (1, 16, 1, 1), (4, 1, 1, 1), (4, 4, 2, 1), (4, 1, 4, 4), (4, 2, 8, 4)],  # counted with accelerate
)
def test_minibatches_are_the_steps_that_trl_takes(tmp_path, per_device, accumulated, minibatches, steps):
    text = (
        f"per_device_train_batch_size: {per_device}\ngradient_accumulation_steps: {accumulated}\n"
        f"num_mini_batches: {minibatches}\ntotal_episodes: 4096\nstop_token: eos\n"
    )
    migration = converted(tmp_path, text)
    assert migration.values["minibatches"] == steps
    assert [f.key for f in migration.different] == (["num_mini_batches"] if minibatches > 1 else [])


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("total_episodes: 1000", "iterations", 125),
        ("num_train_epochs: 2", "iterations", 25),  # of 100 prompts, 8 in an iteration
        ("warmup_steps: 5\ntotal_episodes: 400", "optimizer.warmup_fraction", 0.1),
        ("warmup_steps: 0.2\ntotal_episodes: 400", "critic.optimizer.warmup_fraction", 0.2),
        ("warmup_ratio: 0.3\ntotal_episodes: 400", "optimizer.warmup_fraction", 0.3),
        ("lr_scheduler_type: constant_with_warmup", "optimizer.schedule", "constant"),
        ("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.1}",
         "optimizer.min_lr_fraction", 0.1),
        ("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 3e-7}",
         "optimizer.min_lr_fraction", pytest.approx(0.1)),
        ("deepspeed: ds.json", "optimizer.clip_grad", 1.0),
        ("save_steps: 0.5\ntotal_episodes: 160", "checkpoint_every", 10),
        ("save_strategy: 'no'\ntotal_episodes: 160", "checkpoint_every", 20),
        ("num_sample_generations: 0", "eval_every", 0),
        ("response_length: 4000", "token_budget", 8000),
        ("stop_token_id: 7", "sampling.stop_token_ids", [7]),
        ("report_to: [wandb, tensorboard]", "run.log_to", ["wandb"]),
        ("bf16: false", "run.dtype", "fp32"),
        ("gradient_checkpointing: true", "run.recompute", "full"),
        ("use_peft: true\nlora_target_modules: all-linear", "lora.target_modules", PPOConfig().lora.target_modules),
        ("use_peft: true\nlora_r: 8", "lora.rank", 8),
        ("use_peft: true", "critic.init", "actor"),
    ],
)  # fmt: skip
def test_values_that_are_computed(tmp_path, text, key, value):
    assert converted(tmp_path, text + "\n", dataset_size=100).values[key] == value


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ("vf_coef: 0.5", "vf_coef", "Adam"),
        ("whiten_rewards: true", "whiten_rewards", "advantages are"),
        ("response_length: 10", "stop_token", "EOS"),
        ("stop_token: eos\nfp16: true", "bf16", "no fp16"),
        ("stop_token: eos\noptim: adafactor", "optim", "AdamW"),
        ("stop_token: eos\nlr_scheduler_type: polynomial", "lr_scheduler_type", "polynomial"),
        ("stop_token: eos\nreport_to: comet_ml", "report_to", "loggers"),
        ("use_peft: true\nuse_dora: true", "use_dora", "plain LoRA"),
        ("load_in_4bit: true", "load_in_4bit", "fp32 or bf16"),
    ],
)
def test_what_has_no_equivalent_is_reported_with_its_reason(tmp_path, text, key, reason):
    missing = {finding.key: str(finding) for finding in converted(tmp_path, text + "\n", dataset_size=100).missing}
    assert reason in missing[key]
    if key in text:
        line = next(n for n, line in enumerate(text.splitlines(), 1) if line.startswith(key))
        assert missing[key].startswith(f"{tmp_path}/config.yaml:{line}: {key}=")


def test_a_secret_is_not_printed(tmp_path):
    missing = converted(tmp_path, "hub_token: hf_abcdef\nstop_token: eos\ntotal_episodes: 8\n").missing
    assert [finding.key for finding in missing] == ["hub_token"]
    assert "hf_abcdef" not in str(missing[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_ppo_epoch: 4", r"config.yaml:1: `num_ppo_epoch` is not a key of TRL's PPO .*did you mean num_ppo_epochs"),
        ("gamma: 1\ninit_kl_coef_start_value_x: 1", r"config.yaml:2: `init_kl_coef_start_value_x` is not a key"),
        ("learning_rate: fast", r"config.yaml:1: learning_rate: got fast, expected a number"),
        ("num_ppo_epochs: 1.5", r"config.yaml:1: num_ppo_epochs: got 1.5, expected a whole number"),
        ("gradient_checkpointing: yes", r"config.yaml:1: gradient_checkpointing: got yes, expected true or false"),
        ("gamma: 1\ngamma: 1", r"config.yaml:2: not valid YAML: the key `gamma` is given twice"),
        ("gamma: [", r"config.yaml.*not valid YAML"),
        ("- gamma", r"config.yaml: expected the keys of TRL's PPO .*got list"),
        ("total_episodes: 8\ngamma: 1.5", r"config.yaml:2: gamma=1.5: ppo.gamma: got 1.5"),
        ("total_episodes: 8\nkl_estimator: k9", r"config.yaml:2: kl_estimator=k9: ppo.kl_estimator: got 'k9'"),
        ("gamma: 1", r"total_episodes is not given.*--dataset-size N"),
        ("total_episodes: 8\nnum_mini_batches: 3", r"config.yaml:2: num_mini_batches=3 does not divide .* = 8"),
        ("total_episodes: 8\nwarmup_steps: 5", r"config.yaml:2: warmup_steps=5 is all of the 1 iterations"),
        ("total_episodes: 8\nstop_token: pad", r"config.yaml:2: stop_token=pad"),
        ("total_episodes: 8\ntemperature: 0", r"config.yaml: its run is refused here: ppo.sampling.temperature"),
        ("total_episodes: 8\nuse_peft: true\nlora_target_modules: [w_pack]", r"refused here: .*w_pack"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text + "\n")
    with pytest.raises(ConfigError, match=message):
        command.main(["trl", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "out.yaml")])
    assert not (tmp_path / "out.yaml").exists()


def test_arguments_are_checked(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("total_episodes: 8\nstop_token: eos\n")
    (tmp_path / "there.yaml").write_text("mine")
    for arguments, message in (
        (["trl", config, "--world-size", "0"], "--world-size: expected a whole number above 0, got 0"),
        (["trl", config, "--out", tmp_path / "there.yaml"], "already there"),
        (["trl", tmp_path / "none.yaml"], "cannot read"),
        (["verl", config], "invalid choice: 'verl'"),
        ([], "required"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            command.main([str(argument) for argument in arguments])
    (tmp_path / "binary.bin").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        command.main(["trl", str(tmp_path / "binary.bin")])
    assert (tmp_path / "there.yaml").read_text() == "mine"
    printed = run(capsys, "trl", config)
    assert printed.out.startswith("ppo:\n") and "keys converted" in printed.err
    assert cli.main(["migrate", "--help"]) == cli.OK
    assert "--dataset-size" in capsys.readouterr().out


# -- the tables --------------------------------------------------------------------------------------------------------


def test_the_table_has_every_key_once_with_trls_default():
    keys = [key for row in trl.ROWS for key in row.keys]
    assert len(keys) == len(set(keys))
    defaults = {key: row.default for row in trl.ROWS for key in row.keys}
    assert {key: defaults[key] for key in PPO_FIELDS} == PPO_FIELDS
    assert set(MODEL_AND_SCRIPT_FIELDS.split()) <= set(keys)


def test_the_table_has_every_training_argument_of_the_installed_transformers():
    arguments = pytest.importorskip("transformers").TrainingArguments
    keys = {key for row in trl.ROWS for key in row.keys}
    assert {field.name for field in dataclasses.fields(arguments)} - keys == set()


def test_every_row_names_our_keys_or_a_reason():
    ours = {key.name for key in config_keys(PPOConfig)}
    for row in trl.ROWS:
        assert set(row.ours) <= ours, row.keys
        assert row.ours or row.note, row.keys


def test_the_page_has_the_tables_of_the_command():
    assert docs.trl_tables() in PAGE.read_text(encoding="utf-8"), "python -m icegrt.migration.docs writes them"


def test_our_keys_on_the_page_exist():
    ours = {key.name for cls in SECTIONS.values() for key in config_keys(cls)}
    sections = {name.rpartition(".")[0] for name in ours}
    named = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = re.split(r"(?<!\\)\|", line)
        if line.startswith("|") and cells[1].strip() not in ("key", "flag", "---"):
            named += re.findall(r"`(ppo\.[\w.]+)(?:=\w+)?`", "|".join(cells[3:]))
            assert "`" in cells[3] or "no equivalent" in cells[3], line
        elif not line.startswith("|"):
            named += re.findall(r"`(ppo\.[\w.]+)`", line)
    # The first column has NeMo-RL's keys, some of which begin with ppo, too; prose names files.
    unknown = {name for name in named if name not in ours | sections and not name.endswith((".yaml", ".dir"))}
    assert len(named) > 200
    assert unknown == set()
