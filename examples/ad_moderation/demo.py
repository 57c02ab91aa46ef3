"""The complete recipe on a small example: data, SFT, samples, reward model, PPO, and a report.

    python examples/ad_moderation/demo.py --out runs/demo --seed 0
    python examples/ad_moderation/demo.py --out runs/demo_lora --sharing lora

The same command resumes an interrupted demo. Settings are in recipe.yaml; overrides have the usual form:
`demo.py ppo.iterations=4 sft.epochs=1`. Without a GPU the demo starts one data-parallel rank per core, at most four.
`torchrun ... demo.py` sets another number of ranks.

With `--sharing lora` PPO trains adapters for actor and critic on the SFT model, which is the reference, too
(recipe_lora.yaml). SFT and the reward model train all weights: an adapter can only refine what a model knows, and this
one is small and new.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from ad_moderation.outcome import Outcome, assess_both  # noqa: E402
from ad_moderation.prepare import prepare  # noqa: E402
from icegrt import PPOConfig, PPOTrainer, RewardConfig, RewardTrainer, SampleConfig, SFTConfig, SFTTrainer  # noqa: E402
from icegrt.commands import sample  # noqa: E402
from icegrt.utils.console import print_info  # noqa: E402
from staged_run import stages  # noqa: E402
from staged_run.overrides import read_overrides  # noqa: E402

RECIPE = HERE / "recipe.yaml"
# What another mode than full changes.
CHANGES = {"lora": HERE / "recipe_lora.yaml"}


def ppo_changes(sharing: str) -> list[str]:
    """Return what a mode changes in the section `ppo` of recipe.yaml, as overrides."""
    return read_overrides(CHANGES[sharing], "ppo") if sharing in CHANGES else []


class Demo(stages.StagedRun):
    """One run of the demo in `out`."""

    STAGES = ("prepare", "sft", "sample", "reward", "ppo", "report")
    RANK_0_STAGES = ("prepare", "report")
    SECTIONS = ("sft", "sample", "reward", "ppo")
    MAX_RANKS = 4  # a step of the reward model has four prompts

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--sharing",
            choices=("full", "lora"),
            default=os.environ.get("SHARING", "full"),
            help="of PPO. full: a model for each role; lora: actor and critic are adapters on the reference",
        )

    def prepare(self) -> None:
        prepare(self.data, self.seed)
        self.choose_dtype()

    def sft(self) -> None:
        config = SFTConfig.load(
            RECIPE,
            [
                f"sft.model={self.data / 'actor_init'}",
                f"sft.data=[{{path: {self.data / 'sft.jsonl'}}}]",
                f"sft.heldout=[{{path: {self.data / 'prompts_validation.jsonl'}}}, "
                f"{{path: {self.data / 'general_validation.jsonl'}}}]",
                *self.run_overrides("sft"),
            ],
        )
        with SFTTrainer(config) as trainer:
            trainer.train()

    def sample(self) -> None:
        sample.run(
            SampleConfig.load(
                RECIPE,
                [
                    f"sample.model={self.out / 'sft' / 'model'}",
                    f"sample.prompts={self.data / 'reward_prompts.jsonl'}",
                    f"sample.out={self.out / 'rankings.jsonl'}",
                    f"sample.score_function={HERE / 'reward.py'}:checker_reward",
                    f"sample.seed={self.seed}",
                    *self.overrides_of("sample"),
                ],
            )
        )

    def reward(self) -> None:
        config = RewardConfig.load(
            RECIPE,
            [
                f"reward.model={self.out / 'sft' / 'model'}",
                f"reward.data=[{{path: {self.out / 'rankings.jsonl'}}}]",
                *self.run_overrides("reward"),
            ],
        )
        with RewardTrainer(config) as trainer:
            trainer.train()

    def ppo(self) -> None:
        config = PPOConfig.load(
            RECIPE,
            [
                *ppo_changes(self.options["sharing"]),
                f"ppo.actor={self.out / 'sft' / 'model'}",
                f"ppo.reward_model={self.out / 'reward' / 'model'}",
                f"ppo.reward_function={HERE / 'reward.py'}:parts_reward",
                f"ppo.prompts={self.data / 'prompts_train.jsonl'}",
                f"ppo.eval_prompts={self.data / 'prompts_validation.jsonl'}",
                f"ppo.run.dtype={self.dtype(of_older_versions='fp32')}",
                *self.run_overrides("ppo"),
            ],
        )
        with PPOTrainer(config) as trainer:
            self.assess(trainer, "before", assess_both)
            trainer.train()
            self.assess(trainer, "after", assess_both)

    def report(self) -> None:
        for name in ("metrics.jsonl", "config.yaml"):
            shutil.copyfile(self.out / "ppo" / name, self.out / name)
        for name, source in (("tensorboard", self.out / "ppo"), ("actor", self.out / "ppo" / "model")):
            shutil.rmtree(self.out / name, ignore_errors=True)
            shutil.copytree(source / name if name == "tensorboard" else source, self.out / name)
        outcome = Outcome(self.out)
        outcome.write()
        for line in outcome.lines():
            print_info(line)
        print_info(f"page: {self.out / 'report.html'}\nactor: {self.out / 'actor'}")


if __name__ == "__main__":
    sys.exit(stages.main(Demo, __doc__, "runs/demo"))
