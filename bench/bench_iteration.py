"""Whole PPO iterations of a small Llama on a CPU, in fp32 and in bf16, in turn.

64 episodes of 16 to 64 prompt tokens and 64 answer tokens; 4 layers of width 256, a vocabulary of 4096. The target is
printed: an iteration in bf16 takes at most half of the time of one in fp32.

`--profile` prints the operations that take most of the time of an iteration in bf16 instead, and how often each ran.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from icegrt import PPOConfig, PPOTrainer
from icegrt.config import CriticConfig, RunConfig, SamplingConfig

VOCAB, EPISODES, ANSWER, PROMPT = 4096, 64, 64, (16, 64)
DTYPES = ("fp32", "bf16")
TARGET = 0.5


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per word, `w0` to `w4093`, with a pad and an EOS token."""
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(VOCAB - 2))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")


def model() -> LlamaForCausalLM:
    """Return the actor: random weights, in fp32."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8}
    tokens = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens, num_key_value_heads=4, max_position_embeddings=256))


def trainer(
    folder: Path,
    dtype: str,
    iterations: int,
    *,
    episodes: int = EPISODES,
    samples: int = 1,
    prompt: tuple[int, int] = PROMPT,
    minibatch_by: Literal["response", "prompt"] = "response",
) -> PPOTrainer:
    """Return a trainer whose reward is the share of even words in an answer.

    Args:
        folder: where the run's folder is made.
        dtype: "fp32" or "bf16".
        iterations: how many will be run.
        episodes: answers of an iteration.
        samples: answers per prompt.
        prompt: shortest and longest prompt, in tokens.
        minibatch_by: as `ppo.minibatch_by`.
    """
    draw = random.Random(0)
    count = episodes // samples
    texts = (" ".join(f"w{draw.randrange(VOCAB - 2)}" for _ in range(draw.randint(*prompt))) for _ in range(count))
    config = PPOConfig(
        iterations=iterations + 1,
        prompts_per_iteration=count,
        samples_per_prompt=samples,
        minibatch_by=minibatch_by,
        ppo_epochs=1,
        minibatches=1,
        eval_every=0,
        checkpoint_every=10**6,
        sampling=SamplingConfig(max_new_tokens=ANSWER),
        critic=CriticConfig(init="actor"),
        run=RunConfig(dir=str(folder / f"{dtype}-{minibatch_by}"), dtype=dtype),
    )

    def reward(samples) -> list[float]:
        return [sum(token % 2 == 0 for token in s.tokens) / max(len(s.tokens), 1) for s in samples]

    return PPOTrainer(config, model(), tokenizer(), reward, [{"prompt": text} for text in texts])


@dataclass
class Timings:
    """Iterations of one trainer.

    Attributes:
        seconds, cpu_seconds: of each iteration, by the clock and by the processor's time.
        phases: seconds by phase of each iteration.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """The median seconds of each phase."""
        medians = {name: statistics.median(p.get(name, 0.0) for p in self.phases) for name in self.phases[0]}
        return ", ".join(f"{name} {median:.3f}" for name, median in medians.items())


def time_in_turn(trainers: dict[str, PPOTrainer], rounds: int) -> dict[str, Timings]:
    """Return the timings of `rounds` iterations of each trainer, taken in turn, and close the trainers.

    The order alternates, and each trainer's first iteration, which fills caches, is left out.
    """
    timings = {name: Timings() for name in trainers}
    for round_ in range(rounds + 1):
        for name in trainers if round_ % 2 else reversed(trainers):
            begin, cpu_begin = time.perf_counter(), time.process_time()
            row = trainers[name].step()
            if round_:
                timings[name].seconds.append(time.perf_counter() - begin)
                timings[name].cpu_seconds.append(time.process_time() - cpu_begin)
                timings[name].phases.append(row.seconds_by_phase)
    for each in trainers.values():
        each.close()
    return timings


def median_quotients(numerator: Timings, denominator: Timings) -> tuple[float, float]:
    """Return the medians of the quotients of paired iterations: of seconds, and of the processor's seconds."""
    pairs = (numerator.seconds, denominator.seconds), (numerator.cpu_seconds, denominator.cpu_seconds)
    by_clock, by_cpu = (statistics.median(a / b for a, b in zip(*pair, strict=True)) for pair in pairs)
    return by_clock, by_cpu


def measure(rounds: int, threads: int) -> None:
    """Print the median seconds of an iteration by dtype and phase, and the quotient of bf16 and fp32."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {dtype: trainer(Path(folder), dtype, rounds + 1) for dtype in DTYPES}
        timings = time_in_turn(trainers, rounds)
    for dtype, each in timings.items():
        seconds, cpu_seconds = statistics.median(each.seconds), statistics.median(each.cpu_seconds)
        print(f"{dtype}: {seconds:.3f} s, {cpu_seconds:.3f} s of the processor  {each.summary}")
    quotient, cpu_quotient = median_quotients(timings["bf16"], timings["fp32"])
    print(f"bf16 / fp32: {quotient:.2f}, of the processor's time {cpu_quotient:.2f} (medians of {rounds} pairs)")
    print(f"target: at most {TARGET}")


def profile(threads: int) -> None:
    """Print the operations of one iteration in bf16."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        each = trainer(Path(folder), "bf16", 2)
        each.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
            each.step()
        each.close()
    print(record.key_averages().table(sort_by="self_cpu_time_total", row_limit=45, max_name_column_width=50))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed iterations of each dtype")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--profile", action="store_true", help="print the operations of one iteration in bf16")
    options = parser.parse_args()
    profile(options.threads) if options.profile else measure(options.rounds, options.threads)
