"""The whole recipe on a small example: data, SFT, samples, reward model, PPO, and a page that says what came of it.

    python examples/ad_moderation/demo.py --out runs/demo --seed 0

Run again after an interruption, it continues where it was. Settings are in recipe.yaml; overrides work as everywhere:
`demo.py ppo.iterations=4 sft.epochs=1`. Without a GPU it starts one data-parallel rank for each core, at most four;
`torchrun ... demo.py` starts as many as it is told.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from ad_moderation.outcome import Outcome, assess_both  # noqa: E402
from ad_moderation.prepare import prepare  # noqa: E402
from icegrt import PPOConfig, PPOTrainer, RewardConfig, RewardTrainer, SampleConfig, SFTConfig, SFTTrainer  # noqa: E402
from icegrt.commands import sample  # noqa: E402
from icegrt.distributed import failure  # noqa: E402
from icegrt.errors import UserError  # noqa: E402
from icegrt.utils.console import duration, is_main, print_info  # noqa: E402

RECIPE = HERE / "recipe.yaml"
CHECKER = f"{HERE / 'reward.py'}:checker_reward"
STAGES = ("prepare", "sft", "sample", "reward", "ppo", "report")
ALONE = ("prepare", "report")  # the work of rank 0
MOST_RANKS = 4  # a step of the reward model has four prompts


class Demo:
    """One run of the demo in `out`. Each stage leaves a file that says it is done, with the seconds it took.

    Every rank walks through the stages. Rank 0 writes, and the others do not begin a stage before the file of the one
    before it is there.
    """

    def __init__(self, out: Path, seed: int, overrides: list[str]) -> None:
        self.out, self.seed, self.overrides = out, seed, overrides
        self.data = out / "data"
        out.mkdir(parents=True, exist_ok=True)
        if is_main():
            self._check_same_settings()

    def run(self) -> None:
        """All stages that are not done yet."""
        for number, name in enumerate(STAGES, 1):
            done = self.out / "stages" / f"{name}.json"
            if done.is_file():
                print_info(f"[{number}/{len(STAGES)}] {name}: done before")
                continue
            print_info(f"[{number}/{len(STAGES)}] {name}")
            started = time.perf_counter()
            if is_main() or name not in ALONE:
                getattr(self, name)()
            seconds = time.perf_counter() - started
            if is_main():
                done.parent.mkdir(exist_ok=True)
                done.write_text(json.dumps({"seconds": seconds}) + "\n", encoding="utf-8")
            while not done.is_file():
                time.sleep(0.05)
            print_info(f"    {name} took {duration(seconds)}")

    # -- stages ----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        prepare(self.data, self.seed)

    def sft(self) -> None:
        config = SFTConfig.load(
            RECIPE,
            [
                f"sft.model={self.data / 'actor_init'}",
                f"sft.data=[{{path: {self.data / 'sft.jsonl'}}}]",
                f"sft.heldout=[{{path: {self.data / 'prompts_validation.jsonl'}}}, "
                f"{{path: {self.data / 'general_validation.jsonl'}}}]",
                *self._run("sft"),
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
                    f"sample.score_function={CHECKER}",
                    f"sample.seed={self.seed}",
                    *self._mine("sample"),
                ],
            )
        )

    def reward(self) -> None:
        config = RewardConfig.load(
            RECIPE,
            [
                f"reward.model={self.out / 'sft' / 'model'}",
                f"reward.data=[{{path: {self.out / 'rankings.jsonl'}}}]",
                *self._run("reward"),
            ],
        )
        with RewardTrainer(config) as trainer:
            trainer.train()

    def ppo(self) -> None:
        config = PPOConfig.load(
            RECIPE,
            [
                f"ppo.actor={self.out / 'sft' / 'model'}",
                f"ppo.reward_model={self.out / 'reward' / 'model'}",
                f"ppo.reward_function={CHECKER}",
                f"ppo.prompts={self.data / 'prompts_train.jsonl'}",
                f"ppo.eval_prompts={self.data / 'prompts_validation.jsonl'}",
                *self._run("ppo"),
            ],
        )
        with PPOTrainer(config) as trainer:
            self._assess(trainer, "before")
            trainer.train()
            self._assess(trainer, "after")

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

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _assess(self, trainer: PPOTrainer, when: str) -> None:
        path = self.out / f"assessment_{when}.json"
        if path.is_file():
            return
        document = assess_both(trainer, self.data)
        if not is_main():
            return
        aside = path.with_suffix(".writing")
        aside.write_text(json.dumps(document), encoding="utf-8")
        os.replace(aside, path)

    def _run(self, stage: str) -> list[str]:
        """Where a stage runs; what was begun there is continued."""
        return [
            f"{stage}.run.dir={self.out / stage}",
            f"{stage}.run.seed={self.seed}",
            f"{stage}.run.resume=auto",
            *self._mine(stage),
        ]

    def _mine(self, stage: str) -> list[str]:
        return [override for override in self.overrides if override.startswith(f"{stage}.")]

    def _check_same_settings(self) -> None:
        path, settings = self.out / "demo.json", {"seed": self.seed, "overrides": self.overrides}
        if path.is_file():
            if json.loads(path.read_text(encoding="utf-8")) != settings:
                raise UserError(f"{self.out}: holds a demo with other settings; choose another --out or delete it")
        elif any(self.out.iterdir()):
            raise UserError(f"{self.out}: not empty, and not a demo's folder; choose another --out")
        else:
            path.write_text(json.dumps(settings) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/demo")), help="folder of the run")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, sampling and training")
    parser.add_argument("overrides", nargs="*", help="settings, as in sft.epochs=1 ppo.kl_coef=0.1")
    arguments = parser.parse_args()
    unknown = [o for o in arguments.overrides if o.split(".")[0] not in STAGES or "=" not in o]
    if unknown:
        parser.error(f"expected STAGE.KEY=VALUE with a stage of sft, sample, reward or ppo, got {unknown[0]!r}")
    ranks = _ranks()
    if ranks > 1:
        return _launch(ranks)
    try:
        with failure.exit_on_peer_failure():
            Demo(arguments.out, arguments.seed, arguments.overrides).run()
    except UserError as error:
        if failure.should_report(error):
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        _interrupted()
        return 130
    return 0


def _ranks() -> int:
    """Ranks to start: 1 where torchrun has started them already, and on a GPU, which this model does not fill."""
    import torch

    if "WORLD_SIZE" in os.environ or torch.cuda.is_available():
        return 1
    return min(_cores(), MOST_RANKS)


def _cores() -> int:
    """The cores this process may use, which in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _launch(ranks: int) -> int:
    """This script again, once for each of `ranks`. Its end, or Ctrl-C, is theirs too.

    torchrun would do, but it answers Ctrl-C with a page of its own frames.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {"OMP_NUM_THREADS": str(max(1, _cores() // ranks)), **os.environ}
    environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    processes = []
    try:
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # A session of their own: Ctrl-C reaches this process alone, and ranks end by SIGTERM.
            process = subprocess.Popen([sys.executable, *sys.argv], env=environment | place, start_new_session=True)
            processes.append(process)
        codes = [process.wait() for process in processes]
    except KeyboardInterrupt:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        _interrupted()
        return 130
    return next((abs(code) for code in codes if code), 0)


def _interrupted() -> None:
    if is_main():
        print("\ninterrupted; the same command continues from here", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
