"""A reward function that ties often, and runs whose groups of responses then have no advantage."""

from icegrt.config import CriticConfig
from icegrt.ppo.trainer import PPOTrainer
from tests.helpers import tiny_models as tiny


def has_vowel_early(samples) -> list[float]:
    """Return 1 where one of the first two tokens is a vowel, else 0."""
    return [float(any(c in "aeiou" for c in s.text[:2])) for s in samples]


def tied_config(folder, **changes):
    """Return the configuration of a run with rloo and without a KL penalty: equal scores are advantages of 0."""
    settings = {"advantage": "rloo", "kl_coef": 0.0, "samples_per_prompt": 3, "prompts_per_iteration": 6}
    return tiny.ppo_config(folder, **(settings | {"critic": CriticConfig(init="actor")} | changes))


def tied_trainer(config, callbacks=(), reward=has_vowel_early, **model):
    """Return a trainer whose only source of reward is a function. model: changes of the actor's sizes."""
    return PPOTrainer(config, tiny.causal_lm(0, **model), tiny.tokenizer(), reward, tiny.PROMPTS, callbacks=callbacks)
