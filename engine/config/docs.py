"""Generate the help of every command and docs/configuration.md from the configuration classes."""

from __future__ import annotations

import sys

from icegrt.config.introspect import SECTIONS, config_keys


def help_text(cls: type) -> str:
    """Return every key with type, default, unit, bounds and meaning, as plain text."""
    lines = []
    for key in config_keys(cls):
        notes = ", ".join(part for part in (key.unit, key.bounds) if part)
        lines.append(f"  {key.name}: {key.type} = {key.default}" + (f"  [{notes}]" if notes else ""))
        lines.append(f"      {key.help}")
    return "\n".join(lines)


_INTRODUCTION = """\
# Configuration

`python -m icegrt.config.docs > docs/configuration.md` generates this page. `icegrt COMMAND --help` prints the keys of
one command.

A recipe is one YAML file whose sections are named after the commands. Each command reads its own section only, so one
file can hold the complete recipe:

```yaml
sft:
  model: path/to/base
  data: [{path: instructions.jsonl, weight: 1}]
ppo:
  actor: runs/sft/model
  optimizer: {lr: 1e-5}
```

Overrides come after the file and name the section first; the last one wins:

```bash
icegrt ppo recipe.yaml ppo.kl_coef=0.1 ppo.optimizer.lr=1e-4
icegrt sft recipe.yaml 'sft.data=[{path: a.jsonl, weight: 1}, {path: b.jsonl, weight: 0.5}]'
icegrt ppo recipe.yaml --print-config        # the resolved configuration, as YAML
```

* Values are YAML: `1e-4` is a number, only `true` and `false` are booleans, `null` is no value. If a key is text, an
  override uses everything after `=` unchanged.
* A partial nested section keeps the command's defaults for its other keys. A list replaces the complete default list.
* Relative paths start at the current directory, not at the file. Neither `~` nor environment variables are expanded.
* An unknown section or key, a duplicate key, a value of the wrong type or out of bounds is an error. The message names
  the file and line, and the command does not start.
* Secrets are hidden before a configuration is saved, printed or sent to a logger. Secrets are texts under keys that
  name a token, secret, password or API key (`hub_token`, but not `token_budget` or `stop_token`); and passwords in
  URLs.

In Python: `PPOConfig.load("recipe.yaml", ["ppo.kl_coef=0.1"])`. Objects are frozen; `dataclasses.replace` returns a
changed copy.

[Concepts](concepts.md) defines the kinds of scores and rewards, and lists the batch sizes of TRL and verl.
"""


def markdown() -> str:
    """Return the text of `docs/configuration.md`."""
    parts = [_INTRODUCTION]
    for section, cls in SECTIONS.items():
        parts.append(f"\n## {section}\n\n{(cls.__doc__ or '').strip()}\n\n| key | type | default | unit | meaning |")
        parts.append("|---|---|---|---|---|")
        for key in config_keys(cls):
            bounds = f" ({key.bounds})" if key.bounds else ""
            cells = (f"`{key.name}`", key.type + bounds, f"`{key.default}`", key.unit, key.help)
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
