"""Secrets are told by the names of their keys and the form of their values; what only looks like one stays."""

import pytest

from icegrt import cli
from icegrt.config import PPOConfig
from icegrt.config import loader as config_io
from icegrt.errors import ConfigError
from icegrt.utils.redaction import REDACTED, is_secret, redact, redact_text

SECRETS = ["token", "hub_token", "hf_token", "access_token", "api_key", "apiKey", "api_keys", "password", "db_password"]
SECRETS += ["client_secret", "secret", "secret_key", "SECRET", "passwd", "private_key", "API_TOKEN", "hub_tokens"]
PLAIN = [
    "token_budget",
    "stop_token_ids",
    "max_new_tokens",
    "stop_token",
    "eos_token",
    "pad_token",
    "tokens",
    "label_key",
]
PLAIN += ["token_env", "tokenizer", "key", "keys", "max_answer_bytes", "tokens_per_second", "monkey", "name", ""]


@pytest.mark.parametrize("name", SECRETS)
def test_names_of_secrets(name):
    assert is_secret(name)


@pytest.mark.parametrize("name", PLAIN)
def test_names_that_only_look_like_it(name):
    assert not is_secret(name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://me:hunter2@host:80/x", f"http://{REDACTED}@host:80/x"),
        ("postgres://hunter2@host/x", f"postgres://{REDACTED}@host/x"),
        ("Authorization: Bearer hunter2", f"Authorization: {REDACTED}"),
        ("{'Authorization': 'Basic aHVudGVyMg=='}", f"{{'Authorization': '{REDACTED}'}}"),
        ("sent Bearer hunter2hunter2 to it", f"sent Bearer {REDACTED} to it"),
        ("http://h/x?api_key=hunter2&n=1", f"http://h/x?api_key={REDACTED}&n=1"),
        ("`ppo.hub_token=hunter2` has", f"`ppo.hub_token={REDACTED}` has"),
        ("password='hunter 2'", f"password={REDACTED}"),
        ("write to someone@example.org about ppo.token_budget=20", None),
        ("eos_token=</s> and https://host/a@b?tokens=3", None),
        ("the bearer of bad news", None),
    ],
)
def test_texts(text, expected):
    assert redact_text(text) == (text if expected is None else expected)
    assert "hunter" not in redact_text(text)


def test_data_are_redacted_to_any_depth():
    data = {
        "a": [{"hub_token": "x", "url": "http://u:p@h/"}],
        "secrets": {"b": ["x", "y"]},
        "token_budget": 4,
        "n": None,
    }
    assert redact(data) == {
        "a": [{"hub_token": REDACTED, "url": f"http://{REDACTED}@h/"}],
        "secrets": {"b": [REDACTED, REDACTED]},
        "token_budget": 4,
        "n": None,
    }


def test_a_url_with_a_password_is_saved_without_it_and_asked_for_again(tmp_path, capsys):
    override = "ppo.reward.sources=[{url: 'http://me:hunter2@h/'}]"
    config = PPOConfig.load(None, [override])
    assert config.reward.sources[0].url == "http://me:hunter2@h/"
    config.save(tmp_path / "c.yaml")
    assert "hunter2" not in (tmp_path / "c.yaml").read_text()
    assert "hunter2" not in str(config_io.as_dict(config))
    assert cli.main(["ppo", override, "--print-config"]) == 0
    assert "hunter2" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"ppo\.reward\.sources\[0\]\.url.*give it again"):
        PPOConfig.load(tmp_path / "c.yaml")
