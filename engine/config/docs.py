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

Three words have one meaning on this page:

* **score**: one number per response. Each source (a reward model, a reward function, an HTTP scorer) gives one. The
  score of a response is the total: the weighted sum over all sources, with reward models normalized.
* **task score**: the score of the first reward function or HTTP scorer, by which a run is judged.
* **reward**: one number per token, which PPO discounts and sums: the score at the last token, the KL penalty (if
  `ppo.kl_in: reward`), and a function's token rewards.

Batch sizes in other libraries:
"""

# Key, TRL, verl. Names of TRL's PPOConfig; verl's are below `actor_rollout_ref`, except data.*.
_BATCH_SIZES = (
    ("key", "TRL", "verl"),
    ("---", "---", "---"),
    ("`ppo.prompts_per_iteration`", "rollout batch of all ranks", "`data.train_batch_size`"),
    ("`ppo.samples_per_prompt`", "1 in PPO; GRPO: `num_generations`", "`rollout.n`"),
    ("`ppo.ppo_epochs`", "`num_ppo_epochs`", "`actor.ppo_epochs`"),
    (
        "`ppo.minibatches`, a count: one optimizer step each",
        "`num_mini_batches`",
        "`data.train_batch_size` / `actor.ppo_mini_batch_size` (a size, in prompts)",
    ),
    (
        "`*.token_budget`, tokens of a micro-batch without padding",
        "replaces `per_device_train_batch_size` (sequences)",
        "`actor.ppo_max_token_len_per_gpu`, with `actor.use_dynamic_bsz=true`",
    ),
    (
        "`*.max_batch`, sequences decoded at a time on each data-parallel rank",
        "`local_rollout_forward_batch_size`",
        "`rollout.max_num_seqs`",
    ),
)


def markdown() -> str:
    """Return the text of `docs/configuration.md`."""
    parts = [_INTRODUCTION, *(f"| {' | '.join(row)} |" for row in _BATCH_SIZES)]
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
