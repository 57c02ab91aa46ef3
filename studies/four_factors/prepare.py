"""What every setting of one seed starts from: data, an SFT model, and for the study of rewards two reward models.

python studies/four_factors/prepare.py --out FOLDER --seed 0 --rewards

data/, sft/model      the task of examples/sorting and its SFT model, the actor
reward_actor/model    a reward model trained on answers of the actor, ranked by their exactness
reward_other/model    the same on answers of another model: another initialization, other labelled rows, as long
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "examples"))

from icegrt.commands import sample  # noqa: E402
from icegrt.config import RewardConfig, SampleConfig, SFTConfig  # noqa: E402
from icegrt.training import reward_model, sft  # noqa: E402
from sorting.digits import prepare  # noqa: E402

RECIPE = HERE / "recipe.yaml"
OTHER_SEED = 10_000


def train_actor(out: Path, seed: int) -> None:
    """Write the data and the SFT model of a seed into `out`."""
    prepare(out / "data", seed)
    overrides = [
        f"sft.model={out / 'data' / 'actor_init'}",
        f"sft.data=[{{path: {out / 'data' / 'sft.jsonl'}}}]",
        f"sft.run.dir={out / 'sft'}",
        f"sft.run.seed={seed}",
    ]
    sft.run(SFTConfig.load(RECIPE, overrides))


def train_reward(out: Path, name: str, model: Path, seed: int) -> None:
    """Write `reward_<name>`, a reward model on answers of `model` to the prompts in `out`."""
    answers = out / f"answers_{name}.jsonl"
    overrides = [
        f"sample.model={model}",
        f"sample.prompts={out / 'data' / 'prompts.jsonl'}",
        f"sample.out={answers}",
        f"sample.score_function={HERE / 'exactness.py'}:exactness",
        f"sample.seed={seed}",
    ]
    sample.run(SampleConfig.load(RECIPE, overrides))
    overrides = [
        f"reward.model={out / 'sft' / 'model'}",
        f"reward.data=[{{path: {answers}}}]",
        f"reward.run.dir={out / f'reward_{name}'}",
        f"reward.run.seed={seed}",
    ]
    reward_model.run(RewardConfig.load(RECIPE, overrides))


def main() -> None:
    """Prepare one seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--rewards", action="store_true", help="train the two reward models, too")
    args = parser.parse_args()
    train_actor(args.out, args.seed)
    if args.rewards:
        train_actor(args.out / "other", args.seed + OTHER_SEED)
        train_reward(args.out, "actor", args.out / "sft" / "model", args.seed)
        train_reward(args.out, "other", args.out / "other" / "sft" / "model", args.seed)


if __name__ == "__main__":
    main()
