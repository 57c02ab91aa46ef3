"""PPO that learns where anyone can see it: six digits to sort, a short SFT on few rows, then PPO on exact match.

    python examples/sorting/run.py --out runs/learn --seed 0

The same command resumes an interrupted run. Settings are in sorting.yaml; overrides have the usual form:
`run.py ppo.iterations=20 sft.epochs=2`. Without a GPU it starts one data-parallel rank per core, at most four.
`torchrun ... run.py` sets another number of ranks.

After PPO the SFT model is trained on its rows alone, for as many seconds as PPO took: the curve to compare with.
"""

import math
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from icegrt import PPOConfig, PPOTrainer, SFTConfig, SFTTrainer  # noqa: E402
from icegrt.data import open_rows  # noqa: E402
from icegrt.utils.console import print_info  # noqa: E402
from sorting.curve import ExactMatchCurve, ppo_curve, sft_seconds_per_step  # noqa: E402
from sorting.digits import prepare  # noqa: E402
from sorting.outcome import Outcome, assess_actor, assess_sft  # noqa: E402
from staged_run import stages  # noqa: E402

SETTINGS = HERE / "sorting.yaml"
# Plain PPO with fewer iterations, for studies and options.
SHORT = HERE / "short.yaml"
CURVE_POINTS = 20


def ppo_inputs(out: Path) -> list[str]:
    """Return the overrides that name the models and files of a run in `out` whose SFT is finished."""
    return [
        f"ppo.actor={out / 'sft' / 'model'}",
        f"ppo.reward_function={HERE / 'reward.py'}:exact_match",
        f"ppo.prompts={out / 'data' / 'prompts.jsonl'}",
        f"ppo.eval_prompts={out / 'data' / 'validation.jsonl'}",
    ]


class Sorting(stages.StagedRun):
    """One run of the example in `out`."""

    STAGES = ("prepare", "sft", "ppo", "sft_alone", "report")
    RANK_0_STAGES = ("prepare", "report")
    SECTIONS = ("sft", "ppo")

    def prepare(self) -> None:
        prepare(self.data, self.seed)

    def sft(self) -> None:
        self._train_sft("sft", self.data / "actor_init")

    def ppo(self) -> None:
        config = PPOConfig.load(SETTINGS, [*ppo_inputs(self.out), *self.run_overrides("ppo")])
        with PPOTrainer(config) as trainer:
            self.assess(trainer, "before", assess_actor)
            trainer.train()
            self.assess(trainer, "after", assess_actor)

    def sft_alone(self) -> None:
        seconds, per_step = ppo_curve(self.out / "ppo").seconds[-1], sft_seconds_per_step(self.out / "sft")
        self._train_sft("sft_alone", self.out / "sft" / "model", steps=math.ceil(seconds / per_step))

    def report(self) -> None:
        outcome = Outcome(self.out)
        page = outcome.write()
        for line in outcome.lines():
            print_info(line)
        print_info(f"page: {page}\ncurves: {self.out / 'learning.png'}\nmodel: {self.out / 'ppo' / 'model'}")

    def _train_sft(self, name: str, model: Path, steps: int = 0) -> None:
        """Train `model` on the labelled rows in the folder `name`; `steps` replaces the number of epochs."""
        overrides = [
            f"sft.model={model}",
            f"sft.data=[{{path: {self.data / 'sft.jsonl'}}}]",
            *self.run_overrides("sft"),
            f"sft.run.dir={self.out / name}",
        ]
        config = SFTConfig.load(SETTINGS, overrides)
        rows = len(open_rows(self.data / "sft.jsonl"))
        if steps:
            config = SFTConfig.load(SETTINGS, [*overrides, f"sft.epochs={steps * config.batch_sequences / rows}"])
        steps = steps or math.ceil(config.epochs * rows / config.batch_sequences)
        curve = ExactMatchCurve(self.data / "validation.jsonl", every=math.ceil(steps / CURVE_POINTS))
        with SFTTrainer(config, callbacks=[curve]) as trainer:
            trainer.train()
            if name == "sft_alone":
                self.assess(trainer, name, assess_sft)


if __name__ == "__main__":
    sys.exit(stages.main(Sorting, __doc__, "runs/learn"))
