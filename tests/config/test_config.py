"""Configuration files and overrides: what is read, what is refused and how, and that saving loses nothing."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from icegrt.config import (
    SECTIONS,
    DataSource,
    ExportConfig,
    GenerateConfig,
    PPOConfig,
    RewardConfig,
    SampleConfig,
    SFTConfig,
    config_class,
    key,
)
from icegrt.config.docs import help_text, markdown
from icegrt.config.introspect import config_keys
from icegrt.config.loader import as_yaml, load, save
from icegrt.config.strict_yaml import dump, parse
from icegrt.errors import ConfigError
from icegrt.utils.redaction import REDACTED

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes `recipe.yaml` in the current directory and gives its name."""
    monkeypatch.chdir(tmp_path)

    def write(text):
        Path("recipe.yaml").write_text(text)
        return "recipe.yaml"

    return write


def refusal(cls, path=None, overrides=()):
    with pytest.raises(ConfigError) as error_info:
        cls.load(path, overrides)
    message = str(error_info.value)
    assert "pydantic" not in message and "Traceback" not in message
    return message


def test_no_file_and_no_override_gives_the_defaults():
    for cls in SECTIONS.values():
        assert cls.load() == cls()


def test_a_command_reads_its_own_section_only(recipe):
    path = recipe("sft:\n  model: a\n  epochs: 2\nppo:\n  actor: b\n  no_such_key: 1\n")
    assert SFTConfig.load(path).model == "a"
    assert SFTConfig.load(path).epochs == 2.0 and isinstance(SFTConfig.load(path).epochs, float)
    assert "no_such_key" in refusal(PPOConfig, path)


def test_overrides_come_after_the_file_and_the_last_wins(recipe):
    path = recipe("ppo:\n  kl_coef: 0.5\n  gamma: 0.9\n")
    config = PPOConfig.load(path, ["ppo.kl_coef=0.1", "ppo.kl_coef=0.2", "ppo.optimizer.lr=1e-4"])
    assert (config.kl_coef, config.gamma, config.optimizer.lr) == (0.2, 0.9, 1e-4)


def test_partly_given_sections_keep_the_defaults_of_their_stage(recipe):
    path = recipe("sft:\n  optimizer: {lr: 2e-5}\n")
    assert SFTConfig.load(path).optimizer == dataclasses.replace(SFTConfig().optimizer, lr=2e-5)
    config = PPOConfig.load(None, ["ppo.critic.optimizer.eps=1e-5", "ppo.critic.optimizer={beta1: 0.8}"])
    assert config.critic.optimizer == dataclasses.replace(PPOConfig().critic.optimizer, eps=1e-5, beta1=0.8)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-4", 1e-4), ("1E-4", 1e-4), ("1.5e+3", 1500.0), (".5", 0.5), ("5.", 5.0), ("1_000", 1000), ("010", 10)),
        *(("true", True), ("yes", "yes"), ("off", "off"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("~", None)),
    ],
)
def test_plain_scalars_mean_what_they_look_like(text, value):
    parsed = parse(text, "test")
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    "text", ["1e-4", "1e5", ".5", "true", "yes", "off", "null", "~", "", "010", "1:30", "0x1F", "=", "a: b"]
)
def test_text_that_looks_like_something_else_comes_back_as_text(text):
    assert parse(dump({"k": text}), "test") == {"k": text}


def test_lists_of_sources_are_read_from_file_and_override(recipe):
    path = recipe("sft:\n  data:\n    - path: a.jsonl\n      weight: 0.5\n    - {path: b.jsonl}\n")
    assert SFTConfig.load(path).data == [DataSource(path="a.jsonl", weight=0.5), DataSource(path="b.jsonl")]
    config = SFTConfig.load(path, ["sft.data=[{path: c.jsonl, weight: 2}]"])
    assert config.data == [DataSource(path="c.jsonl", weight=2.0)]


def test_text_keys_take_an_override_as_it_stands():
    config = PPOConfig.load(
        None, ["ppo.actor=007", "ppo.reward_function=r.py:score", "ppo.run.dir='a b'", "ppo.prompts="]
    )
    assert (config.actor, config.reward_function, config.run.dir, config.prompts) == ("007", "r.py:score", "a b", "")
    assert GenerateConfig.load(None, ["generate.prompt=Translate: a # b"]).prompt == ["Translate: a # b"]
    assert GenerateConfig.load(None, ["generate.prompt=[a, b]"]).prompt == ["a", "b"]


def test_environment_variables_and_tildes_are_not_expanded():
    assert PPOConfig.load(None, ["ppo.run.dir=~/$HOME"]).run.dir == "~/$HOME"


def test_nothing_given_for_text_a_list_a_section_or_an_optional_number_is_their_empty_value(recipe):
    config = PPOConfig.load(recipe("ppo:\n  actor:\n  ptx_data:\n  optimizer:\n  dual_clip:\n"))
    assert config == PPOConfig()
    assert PPOConfig.load(recipe("ppo:\n  # kl_coef: 1\n")) == PPOConfig()
    assert PPOConfig.load(None, ["ppo.dual_clip=3"]).dual_clip == 3.0


def test_a_size_is_a_number_or_a_text():
    sizes = {
        text: PPOConfig.load(None, [f"ppo.rollout.kv_memory={text}"]).rollout.kv_memory for text in ("0.5", "4GiB")
    }
    assert sizes == {"0.5": 0.5, "4GiB": "4GiB"}


def test_whole_numbers_may_be_written_with_an_exponent():
    config = PPOConfig.load(None, ["ppo.kl_horizon_responses=1e4"])
    assert config.kl_horizon_responses == 10_000 and isinstance(config.kl_horizon_responses, int)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("  kl_ceof: 0.1", ["recipe.yaml:2: ppo.kl_ceof is not a key", "did you mean ppo.kl_coef?"]),
        ("  optimizer:\n    lr: 1\n    bta1: 1", ["recipe.yaml:4", "ppo.optimizer.beta1?"]),
        ("  lr: 1e-5", ["did you mean ppo.optimizer.lr or ppo.critic.pretrain.lr or ppo.critic.optimizer.lr?"]),
        ("  boot: 1", ["did you mean ppo.bootstrap_truncated?"]),
        ("  qqq: 1", ["recipe.yaml:2: ppo.qqq is not a key", "icegrt ppo --help"]),
        ("  kl_coef: abc", ["recipe.yaml:2: ppo.kl_coef: got 'abc' (text), expected a number >= 0"]),
        ("  kl_coef: true", ["got true (boolean), expected a number >= 0"]),
        ("  iterations: true", ["got true (boolean), expected a whole number >= 1"]),
        ("  kl_coef: '0.1'", ["got '0.1' (text), expected a number"]),
        ("  kl_coef:", ["ppo.kl_coef: got nothing, expected a number"]),
        ("  kl_coef: .nan", ["got nan (number)"]),
        ("  kl_coef: .inf", ["got inf (number)"]),
        ("  kl_horizon_responses: 1e400", ["got inf (number)"]),
        ("  iterations: 2.5", ["got 2.5 (number), expected a whole number"]),
        ("  iterations: 0", ["got 0 (number), expected a whole number >= 1"]),
        ("  gamma: 1.5", ["expected a number > 0 and <= 1"]),
        ("  dual_clip: 0.5", ["expected a number > 1 or null"]),
        ("  kl_target_nats_per_response: x", ["expected a number > 0, in nats per response"]),
        ("  score_scale: yes", ["got 'yes' (text), expected true or false"]),
        ("  score_scale: 1", ["got 1 (number), expected true or false"]),
        ("  kl_in: rewards", ["got 'rewards' (text), expected one of reward, loss"]),
        ("  kl_in: [reward]", ["(list), expected one of reward, loss"]),
        ("  actor: 7", ["got 7 (number), expected text (put it in quotes)"]),
        ("  actor: [a]", ["(list), expected text"]),
        ("  optimizer: 1e-5", ["expected a mapping with the keys lr, schedule"]),
        ("  ptx_data: a.jsonl", ["got 'a.jsonl' (text), expected a list of {path, input_key, output_key, weight}"]),
        ("  ptx_data:\n    - path: a\n    - b", ["recipe.yaml:4: ppo.ptx_data[1]: got 'b' (text), expected a mapping"]),
        ("  ptx_data:\n    - path: a\n      weight: 0", ["recipe.yaml:4: ppo.ptx_data[0].weight", "> 0"]),
        ("  ptx_data: [{pth: a}]", ["ppo.ptx_data[0].pth is not a key; did you mean ppo.ptx_data[0].path?"]),
        ("  gamma: 0.9\n  gamma: 0.8", ["recipe.yaml:3", "`gamma` is given twice"]),
        ("  gamma: [0.9", ["recipe.yaml:3: not valid YAML"]),
        ("\tgamma: 1", ["recipe.yaml:2: not valid YAML"]),
        ("  gamma: !!python/object/apply:os.getcwd []", ["recipe.yaml:2: not valid YAML"]),
        ("  gamma: !!int x", ["recipe.yaml: not valid YAML"]),
        ("  ? [a, b]\n  : 1", ["recipe.yaml:2", "a key must be text"]),
        ("  gamma: 1\n---\nsft: {}", ["recipe.yaml:3: not valid YAML"]),
        ("  ptx_data: " + "[" * 5000, ["not valid YAML: nested too deeply"]),
    ],
)
def test_a_bad_key_or_value_is_named_with_file_line_and_what_was_expected(recipe, body, words):
    message = refusal(PPOConfig, recipe("ppo:\n" + body + "\n"))
    assert all(word in message for word in words), message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "recipe.yaml is empty"),
        ("# nothing\n", "recipe.yaml is empty"),
        ("- ppo\n", "got a list, expected sections"),
        ("ppo\n", "got a text, expected sections"),
        ("ppo: [1]\n", "recipe.yaml:1: ppo: got a list, expected keys and values"),
        ("sft: {}\n", "recipe.yaml has no section `ppo:`; it has sft"),
        ("ppo: {}\nrewrd: {}\n", "recipe.yaml:2: `rewrd` is not a section; did you mean reward?"),
        ("ppo: {}\nkl_coef: 1\n", "recipe.yaml:2: `kl_coef` is not a section; put it under `ppo:`"),
        ("ppo: {}\nqqq: {}\n", "the sections are sft, sample, reward, value, ppo, generate, export"),
        ("ppo: {}\nppo: {}\n", "recipe.yaml:2: not valid YAML: the key `ppo` is given twice"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(recipe, text, words):
    assert words in refusal(PPOConfig, recipe(text))


def test_a_file_that_cannot_be_read_is_refused(recipe, tmp_path):
    recipe("ppo: {}\n")
    assert "no configuration file recip.yaml; did you mean recipe.yaml?" in refusal(PPOConfig, "recip.yaml")
    assert "no configuration file no/such.yaml; relative paths start at" in refusal(PPOConfig, "no/such.yaml")
    assert "cannot read" in refusal(PPOConfig, tmp_path)
    Path("recipe.yaml").write_bytes(b"ppo: \xff\n")
    assert "recipe.yaml is not UTF-8 text" in refusal(PPOConfig, "recipe.yaml")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("kl_coef=1", "`kl_coef` does not start with its section; did you mean ppo.kl_coef?"),
        ("optimizer.lr=1", "did you mean ppo.optimizer.lr or ppo.critic.optimizer.lr?"),
        ("sft.kl_coef=1", "`sft.kl_coef` is not for this command, which reads `ppo`; did you mean ppo.kl_coef?"),
        ("ppo.kl_ceof=1", "ppo.kl_ceof is not a key; did you mean ppo.kl_coef?"),
        ("ppo.kl_coef", "`ppo.kl_coef` has no value; write ppo.kl_coef=VALUE"),
        ("ppo.kl_coef=", "ppo.kl_coef: got nothing, expected a number >= 0"),
        ("ppo.kl_coef=true", "got true (boolean)"),
        ("ppo.kl_coef=-1", "got -1 (number), expected a number >= 0"),
        ("ppo.kl_coef.x=1", "ppo.kl_coef has no keys of its own; set it as a whole"),
        ("ppo.ptx_data.0.path=a", "ppo.ptx_data has no keys of its own; set it as a whole"),
        ("ppo={}", "`ppo` is a section; name a key"),
        ("=1", "`=1` names no key; write ppo.key=VALUE"),
        ("ppo.ptx_data=[{path: a", "ppo.ptx_data: not valid YAML"),
        ("ppo.ptx_data=[{path: a, weight: 0}]", "ppo.ptx_data[0].weight: got 0 (number)"),
    ],
)
def test_a_bad_override_is_refused_with_the_name_that_was_meant(override, words):
    message = refusal(PPOConfig, None, [override])
    assert message.startswith("command line: ") and words in message


def test_an_override_is_blamed_and_not_the_line_that_it_replaces(recipe):
    path = recipe("ppo:\n  kl_coef: 0.1\n  ptx_data: [{path: a}]\n")
    assert refusal(PPOConfig, path, ["ppo.kl_coef=x"]).startswith("command line: ppo.kl_coef")
    assert refusal(PPOConfig, path, ["ppo.ptx_data=[{path: 1}]"]).startswith("command line: ppo.ptx_data[0].path")


def test_all_problems_are_reported_at_once(recipe):
    message = refusal(PPOConfig, recipe("ppo:\n  gamma: 2\n  kl_ceof: 1\n  iterations: x\n"))
    assert message.startswith("3 problems in the configuration:")
    assert all(f"recipe.yaml:{line}: " in message for line in (2, 3, 4))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PPOConfig(kl_coef=float("inf")), ("ppo.kl_coef", "got inf", "a number >= 0")),
        (lambda: PPOConfig(reward_model_weight=float("nan")), ("ppo.reward_model_weight", "got nan")),
        (lambda: PPOConfig(kl_coef=-1.0), ("ppo.kl_coef", ">= 0")),
        (lambda: PPOConfig(iterations=True), ("ppo.iterations", "got true")),
        (lambda: PPOConfig(kl_coeff=1), ("ppo.kl_coeff is not a key", "did you mean ppo.kl_coef?")),
        (lambda: PPOConfig(optimizer={"beta1": 1.0}), ("ppo.optimizer.beta1", "got 1.0", "< 1")),
        (lambda: PPOConfig(ptx_data=[{"pth": "a"}]), ("ppo.ptx_data[0].pth", "did you mean ppo.ptx_data[0].path?")),
        (lambda: DataSource(weight=0), ("DataSource.weight", "> 0")),
        (lambda: dataclasses.replace(SFTConfig(), epochs=float("nan")), ("sft.epochs", "got nan")),
        (lambda: SFTConfig(epochs=-1, max_length="x"), ("2 problems", "sft.epochs", "sft.max_length")),
        (lambda: RewardConfig(tie_marign=0.1), ("reward.tie_marign", "did you mean reward.tie_margin?")),
        (lambda: RewardConfig(optimizer={"lr": float("inf")}), ("reward.optimizer.lr", "got inf")),
        (lambda: SampleConfig(sampling={"temperature": float("nan")}), ("sample.sampling.temperature", "got nan")),
        (lambda: GenerateConfig(max_bacth=1), ("generate.max_bacth", "did you mean generate.max_batch?")),
        (lambda: ExportConfig(shard_gigabytes=float("inf")), ("export.shard_gigabytes", "got inf")),
        (lambda: ExportConfig(rol="actor"), ("export.rol", "did you mean export.role?")),
    ],
)
def test_a_configuration_made_in_python_is_checked_as_a_file_is(make, words):
    with pytest.raises(ConfigError) as error_info:
        make()
    assert all(word in str(error_info.value) for word in words), str(error_info.value)


def test_a_mapping_in_python_changes_the_defaults_of_its_section():
    config = SFTConfig(optimizer={"lr": 2e-5}, data=({"path": "a.jsonl"}, DataSource(path="b.jsonl")))
    assert config == SFTConfig.load(None, ["sft.optimizer.lr=2e-5", "sft.data=[{path: a.jsonl}, {path: b.jsonl}]"])


def test_anchors_and_merge_keys_share_values_but_not_overrides(recipe):
    path = recipe(
        "ppo:\n  critic: {optimizer: &o {lr: 3e-4, beta1: 0.5}}\n  optimizer:\n    <<: *o\n    lr: 1e-6\n"
        "generate:\n  sampling: &s {top_k: 3}\nsample:\n  sampling: *s\n"
    )
    config = PPOConfig.load(path)
    assert (config.critic.optimizer.lr, config.optimizer.lr, config.optimizer.beta1) == (3e-4, 1e-6, 0.5)
    shared = recipe("ppo:\n  critic: {optimizer: &o {lr: 3e-4}}\n  optimizer: *o\n")
    config = PPOConfig.load(shared, ["ppo.optimizer.lr=1"])
    assert (config.critic.optimizer.lr, config.optimizer.lr) == (3e-4, 1.0)
    endless = recipe("ppo: &a\n  optimizer: *a\n")
    assert "ppo.optimizer.optimizer is not a key" in refusal(PPOConfig, endless)


@pytest.mark.parametrize("cls", SECTIONS.values(), ids=SECTIONS)
def test_saving_and_loading_gives_the_same_configuration(cls, tmp_path):
    config = cls.load(None, [f"{row.name}={_other(row)}" for row in config_keys(cls) if "[]" not in row.name])
    assert config != cls()
    path = tmp_path / "new" / "config.yaml"
    config.save(path)
    assert cls.load(path) == config
    assert [p.name for p in path.parent.iterdir()] == ["config.yaml"]


def _other(row):
    """A valid value that is not the default, and that a careless writer would get wrong."""
    if row.type.startswith("list of {"):
        first = row.type.removeprefix("list of {").partition(",")[0]
        second = "weight: 0.3" if "weight" in row.type else ""
        return f'[{{{first}: "1e-4", {second}}}]'
    if " | " in row.type:
        return next(choice for choice in row.type.split(" | ") if choice != row.default)
    upper = "<" in row.bounds
    values = {"text": "yes", "bool": "false" if row.default == "true" else "true", "list of text": '["1", "a: b", "é"]'}
    values |= {"list of numbers": "[0.5, 2, 1e-3]", "list of whole numbers": "[7, 0]"}
    return values.get(row.type) or ("7" if row.type == "int" else "0.123456789e-3" if upper else "3.5")


def test_saving_where_one_cannot_write_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the configuration"):
        PPOConfig().save(tmp_path / "file" / "config.yaml")


@config_class
class SecretiveConfig:
    section = "secretive"
    hub_token: str = key("", "a secret")
    api_passwords: list[str] = key([], "secrets")
    token_budget: int = key(4, "no secret", ge=1)


def test_secrets_are_hidden_where_a_configuration_is_shown_or_saved(tmp_path):
    config = SecretiveConfig(hub_token="hunter2", api_passwords=["hunter2"], token_budget=5)
    text = as_yaml(config)
    assert "hunter2" not in text and text.count(REDACTED) == 2 and "token_budget: 5" in text
    path = tmp_path / "c.yaml"
    save(config, path)
    assert path.read_text() == text
    assert _refused(SecretiveConfig, path).count("give it again") == 2
    reloaded = load(SecretiveConfig, path, ["secretive.hub_token=x", "secretive.api_passwords=y"])
    assert reloaded == SecretiveConfig(hub_token="x", api_passwords=["y"], token_budget=5)


def test_secrets_are_hidden_in_error_messages(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("secretive:\n  hub_token: [hunter2]\n  api_passwords: {a: hunter2}\n")
    message = _refused(SecretiveConfig, path)
    assert "hunter2" not in message and message.count(REDACTED) == 2


def _refused(cls, path, overrides=()):
    with pytest.raises(ConfigError) as error_info:
        load(cls, path, overrides)
    return str(error_info.value)


def test_configurations_are_frozen():
    config = PPOConfig.load()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.kl_coef = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.optimizer.lr = 1.0


def test_the_list_of_one_configuration_is_not_that_of_another():
    PPOConfig.load().ptx_data.append(DataSource(path="a"))
    assert PPOConfig.load().ptx_data == PPOConfig().ptx_data == []


@pytest.mark.parametrize("cls", SECTIONS.values(), ids=SECTIONS)
def test_help_has_every_key_with_its_default_unit_and_meaning(cls):
    text, named = help_text(cls), {row.name: row for row in config_keys(cls)}
    for row in named.values():
        assert f"{row.name}: {row.type} = {row.default}" in text
        assert row.unit in text and row.bounds in text
        assert row.help and row.help in text
    for name, value in _leaves(dataclasses.asdict(cls()), cls.section):
        assert parse(named[name].default, "help") == value


def _leaves(data, prefix):
    for name, value in data.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}.{name}")
        elif not isinstance(value, list):
            yield f"{prefix}.{name}", value


def test_help_shows_units_and_the_defaults_of_the_stage():
    named = {row.name: row for row in config_keys(PPOConfig)}
    assert named["ppo.kl_target_nats_per_response"].unit == "nats per response"
    assert named["ppo.critic.optimizer.lr"].default == "0.0001"
    assert named["ppo.optimizer.lr"].default == "1e-05"
    assert named["ppo.ptx_data[].weight"].bounds == "> 0"


def test_the_documentation_of_the_keys_is_up_to_date():
    page = ROOT / "docs" / "configuration.md"
    assert page.read_text() == markdown(), "run: python -m icegrt.config.docs > docs/configuration.md"


def test_the_documentation_is_written_by_the_command_that_it_names():
    process = subprocess.run([sys.executable, "-m", "icegrt.config.docs"], capture_output=True, text=True, check=True)
    assert process.stdout == markdown()
