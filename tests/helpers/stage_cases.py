"""Small runs: their checkpoints and data files under one folder, and the configuration keys of each command."""

import json
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import tiny_models

PROMPTS = ["say a", "what is up?", "count to 3", "name a cat", "go on", "why 7?", "sing it", "tell me more"]
REWARD_FILE = """
def share_of_a(samples):
    return [sample.text.count("a") / len(sample.tokens) for sample in samples]
"""


def share_of_a(samples):
    """Return the share of the letter a among the tokens of each response, a score that PPO raises quickly."""
    return [sample.text.count("a") / len(sample.tokens) for sample in samples]


def save_model(folder, model, tokenizer=None):
    """Write a checkpoint with transformers and return its folder."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def write_jsonl(path, rows):
    """Write one row per line and return the path; a string is written unchanged."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def files_under(folder):
    """Return the relative paths of all files and folders below `folder`, but for Python's bytecode."""
    paths = (path.relative_to(folder) for path in Path(folder).rglob("*"))
    return sorted(str(path) for path in paths if "__pycache__" not in path.parts)


def sft_rows():
    return [{"prompt": p, "response": f"{p[:3]} ok"} for p in PROMPTS]


def prompt_rows():
    return [{"prompt": p, "topic": i} for i, p in enumerate(PROMPTS)]


def ranking_rows():
    return [{"prompt": p, "responses": ["aaaa", "abca", "bcd", "zzz"], "scores": [1.0, 0.5, 0.0, 0.0]} for p in PROMPTS]


@dataclass(frozen=True)
class Home:
    """Paths of the checkpoints and files that a run starts from."""

    folder: Path
    actor: str
    reward: str
    prompts: str
    sft: str
    rankings: str
    function: str


def make_home(folder, **model):
    """Write everything that a run starts from. model: family and sizes that differ from the default."""
    tokenizer = tiny_models.tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "score.py").write_text(REWARD_FILE, encoding="utf-8")
    return Home(
        folder,
        save_model(folder / "actor", tiny_models.causal_lm(**model), tokenizer),
        save_model(folder / "scorer", tiny_models.scorer(**model), tokenizer),
        write_jsonl(folder / "prompts.jsonl", prompt_rows()),
        write_jsonl(folder / "sft.jsonl", sft_rows()),
        write_jsonl(folder / "rankings.jsonl", ranking_rows()),
        f"{folder / 'score.py'}:share_of_a",
    )


# Two iterations of eight responses of at most eight tokens.
SMALL_PPO = (
    "ppo.iterations=2",
    "ppo.prompts_per_iteration=4",
    "ppo.samples_per_prompt=2",
    "ppo.sampling.max_new_tokens=8",
    "ppo.token_budget=96",
    "ppo.optimizer.lr=1e-3",
    "ppo.critic.optimizer.lr=1e-3",
    "ppo.checkpoint_every=1",
)


def ppo_keys(home, run, *overrides):
    """Return the keys of a small PPO run with a reward model and a reward function; `overrides` come last."""
    return [
        f"ppo.actor={home.actor}",
        f"ppo.reward_model={home.reward}",
        f"ppo.reward_function={home.function}",
        f"ppo.prompts={home.prompts}",
        f"ppo.run.dir={run}",
        *SMALL_PPO,
        *overrides,
    ]


def sft_keys(home, run, *overrides):
    """Return the keys of a small SFT run on eight rows, which are also its held-out rows."""
    return [
        f"sft.model={home.actor}",
        f"sft.data=[{{path: {home.sft}}}]",
        f"sft.heldout=[{{path: {home.sft}}}]",
        "sft.batch_sequences=4",
        "sft.epochs=1",
        "sft.token_budget=64",
        "sft.optimizer.lr=1e-2",
        f"sft.run.dir={run}",
        *overrides,
    ]


def reward_keys(home, run, *overrides):
    """Return the keys of a small reward-model run on eight prompts with four ranked answers, also held out."""
    return [
        f"reward.model={home.actor}",
        f"reward.data=[{{path: {home.rankings}}}]",
        f"reward.heldout=[{{path: {home.rankings}}}]",
        "reward.batch_prompts=4",
        "reward.token_budget=256",
        "reward.optimizer.lr=1e-2",
        f"reward.run.dir={run}",
        *overrides,
    ]
