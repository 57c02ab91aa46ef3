"""The help of every command and the page docs/configuration.md, from the keys themselves."""

from __future__ import annotations

import sys

from icegrt.config.introspect import SECTIONS, config_keys


def help_text(cls: type) -> str:
    """Every key with type, default, unit, bounds and meaning, as plain text."""
    lines = []
    for row in config_keys(cls):
        notes = ", ".join(part for part in (row.unit, row.bounds) if part)
        lines.append(f"  {row.name}: {row.type} = {row.default}" + (f"  [{notes}]" if notes else ""))
        lines.append(f"      {row.help}")
    return "\n".join(lines)


_INTRODUCTION = """\
# Configuration

This page is written by `python -m icegrt.config.docs > docs/configuration.md`. `icegrt COMMAND --help` prints one
command's keys.

A recipe is one YAML file whose sections are named after the commands. Each command reads its own section and leaves
the others alone, so one file can hold the whole recipe:

```yaml
sft:
  model: path/to/base
  data: [{path: instructions.jsonl, weight: 1}]
ppo:
  actor: runs/sft/final
  optimizer: {lr: 1e-5}
```

Overrides come after the file and name the section first; the last one wins:

```bash
icegrt ppo recipe.yaml ppo.kl_coef=0.1 ppo.optimizer.lr=1e-4
icegrt sft recipe.yaml 'sft.data=[{path: a.jsonl, weight: 1}, {path: b.jsonl, weight: 0.5}]'
icegrt ppo recipe.yaml --print-config        # the resolved configuration, as YAML
```

* Values are YAML: `1e-4` is a number, only `true` and `false` are booleans, `null` is nothing. Where a key takes text,
  an override takes what follows `=` as it stands.
* A nested section that is given in part keeps the command's defaults for the rest. A list is replaced as a whole.
* Relative paths start at the current directory, not at the file. Neither `~` nor environment variables are expanded.
* An unknown section or key, a key given twice, a value of the wrong type or out of bounds is an error that names the
  file and line, and nothing is run.
* Secrets are hidden wherever a configuration is saved, printed or sent to a logger: texts under keys that name a token,
  secret, password or API key (`hub_token`, but not `token_budget` or `stop_token`), and passwords inside URLs.

In Python: `PPOConfig.load("recipe.yaml", ["ppo.kl_coef=0.1"])`. Objects are frozen; `dataclasses.replace` makes others.
"""


def markdown() -> str:
    """`docs/configuration.md`."""
    parts = [_INTRODUCTION]
    for section, cls in SECTIONS.items():
        parts.append(f"\n## {section}\n\n{(cls.__doc__ or '').strip()}\n\n| key | type | default | unit | meaning |")
        parts.append("|---|---|---|---|---|")
        for row in config_keys(cls):
            bounds = f" ({row.bounds})" if row.bounds else ""
            cells = (f"`{row.name}`", row.type + bounds, f"`{row.default}`", row.unit, row.help)
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
