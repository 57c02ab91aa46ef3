"""The complete recipe on a small example: data, SFT, samples, reward model, PPO, and a report.

    python examples/ad_moderation/demo.py --out runs/demo --seed 0
    python examples/ad_moderation/demo.py --out runs/demo_lora --sharing lora

The same command resumes an interrupted demo. Settings are in recipe.yaml; overrides have the usual form:
`demo.py ppo.iterations=4 sft.epochs=1`. Without a GPU the demo starts one data-parallel rank per core, at most four.
`torchrun ... demo.py` sets another number of ranks.

With `--sharing lora` reward model, actor and critic are adapters on the SFT model, which is the reference too. SFT
itself trains all weights: it starts from random ones, and an adapter can only refine what a model knows.
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
from icegrt.utils.console import is_main, print_info  # noqa: E402
from icegrt.utils.files import write_text_atomic  # noqa: E402
from icegrt.utils.text import duration  # noqa: E402

RECIPE = HERE / "recipe.yaml"
CHECKER = f"{HERE / 'reward.py'}:checker_reward"
STAGES = ("prepare", "sft", "sample", "reward", "ppo", "report")
RANK_0_STAGES = ("prepare", "report")
# What --sharing lora changes. Adapters take larger steps than whole models: each moves the weights in few directions.
LORA_SETTINGS = (
    "reward.sharing=lora",
    "reward.optimizer.lr=2e-3",
    "ppo.sharing=lora",
    "ppo.optimizer.lr=3e-4",
    "ppo.critic.optimizer.lr=1e-3",
)
MAX_RANKS = 4  # a step of the reward model has four prompts


class Demo:
    """One run of the demo in `out`.

    A finished stage has a file with its seconds. Rank 0 writes it, and every rank waits for it before the next stage.
    """

    def __init__(self, out: Path, seed: int, sharing: str, overrides: list[str]) -> None:
        self.out, self.seed, self.sharing, self.overrides = out, seed, sharing, overrides
        self.data = out / "data"
        out.mkdir(parents=True, exist_ok=True)
        if is_main():
            self._check_same_settings()

    def run(self) -> None:
        """Run all stages that are not finished."""
        for number, name in enumerate(STAGES, 1):
            finished = self.out / "stages" / f"{name}.json"
            if finished.is_file():
                print_info(f"[{number}/{len(STAGES)}] {name}: finished before")
                continue
            print_info(f"[{number}/{len(STAGES)}] {name}")
            started = time.perf_counter()
            if is_main() or name not in RANK_0_STAGES:
                getattr(self, name)()
            seconds = time.perf_counter() - started
            if is_main():
                finished.parent.mkdir(exist_ok=True)
                write_text_atomic(finished, json.dumps({"seconds": seconds}) + "\n")
            while not finished.is_file():
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
                *self._run_overrides("sft"),
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
                    *self._overrides_of("sample"),
                ],
            )
        )

    def reward(self) -> None:
        config = RewardConfig.load(
            RECIPE,
            [
                f"reward.model={self.out / 'sft' / 'model'}",
                f"reward.data=[{{path: {self.out / 'rankings.jsonl'}}}]",
                *self._run_overrides("reward"),
            ],
        )
        with RewardTrainer(config) as trainer:
            trainer.train()

    def ppo(self) -> None:
        config = PPOConfig.load(
            RECIPE,
            [
                f"ppo.actor={self.out / 'sft' / 'model'}",
                f"ppo.reward_model={self.out / 'reward' / ('adapter' if self.sharing == 'lora' else 'model')}",
                f"ppo.reward_function={CHECKER}",
                f"ppo.prompts={self.data / 'prompts_train.jsonl'}",
                f"ppo.eval_prompts={self.data / 'prompts_validation.jsonl'}",
                *self._run_overrides("ppo"),
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
        if is_main():
            write_text_atomic(path, json.dumps(document))

    def _run_overrides(self, stage: str) -> list[str]:
        return [
            f"{stage}.run.dir={self.out / stage}",
            f"{stage}.run.seed={self.seed}",
            f"{stage}.run.resume=auto",
            *self._overrides_of(stage),
        ]

    def _overrides_of(self, stage: str) -> list[str]:
        settings = [*(LORA_SETTINGS if self.sharing == "lora" else ()), *self.overrides]
        return [setting for setting in settings if setting.startswith(f"{stage}.")]

    def _check_same_settings(self) -> None:
        path = self.out / "demo.json"
        settings = {"seed": self.seed, "sharing": self.sharing, "overrides": self.overrides}
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
    parser.add_argument(
        "--sharing",
        choices=("full", "lora"),
        default=os.environ.get("SHARING", "full"),
        help="full: a model for each role; lora: adapters on the SFT model, which is the reference",
    )
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
            Demo(arguments.out, arguments.seed, arguments.sharing, arguments.overrides).run()
    except UserError as error:
        if failure.should_report(error):
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        _print_interrupted()
        return 130
    return 0


def _ranks() -> int:
    """Return the number of ranks to start: 1 under torchrun, and on a GPU, which this model does not fill."""
    import torch

    if "WORLD_SIZE" in os.environ or torch.cuda.is_available():
        return 1
    return min(_cores(), MAX_RANKS)


def _cores() -> int:
    """Return the number of cores that this process may use; a container can restrict them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _launch(ranks: int) -> int:
    """Start this script once per rank and wait for all. Ctrl-C or SIGTERM ends the ranks too. Return the exit status.

    torchrun would print a long traceback on Ctrl-C.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {"OMP_NUM_THREADS": str(max(1, _cores() // ranks)), **os.environ}
    environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    processes = []
    try:
        for rank in range(ranks):
            rank_environment = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # In a new session, a rank does not get Ctrl-C. This process ends it by SIGTERM.
            command = [sys.executable, *sys.argv]
            processes.append(subprocess.Popen(command, env=rank_environment, start_new_session=True))
        statuses = [process.wait() for process in processes]
    except KeyboardInterrupt:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        _print_interrupted()
        return 130
    return next((abs(status) for status in statuses if status), 0)


def _print_interrupted() -> None:
    if is_main():
        print("\ninterrupted; the same command resumes the demo", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
