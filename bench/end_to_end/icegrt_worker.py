"""Iterations of icegrt: `python -m bench.end_to_end.icegrt_worker WORKLOAD DTYPE [key=value ...]`."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bench.end_to_end.protocol import private_stdout, serve
from bench.end_to_end.recipe import ppo_config
from bench.end_to_end.workloads import WORKLOADS, Workload
from icegrt import PPOConfig, PPOTrainer


def tokenizer(workload: Workload) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token per word, `w2`, `w3` and so on, with a pad and an EOS token."""
    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, workload.vocab))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")


def main() -> None:
    """Serve iterations."""
    out = private_stdout()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("dtype", choices=("fp32", "bf16"))
    parser.add_argument("keys", nargs="*", help="overrides, such as ppo.minibatch_by=prompt")
    options = parser.parse_args()
    workload = WORKLOADS[options.workload]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        base = Path(folder) / "base.yaml"
        ppo_config(workload, Path(folder) / "run", options.dtype).save(base)
        config = PPOConfig.load(base, options.keys)
        actor = Path(folder) / "actor"
        tokens = tokenizer(workload)
        workload.actor().save_pretrained(actor)  # adapters need a checkpoint to belong to
        tokens.save_pretrained(actor)
        prompts = [{"prompt": " ".join(f"w{i}" for i in ids)} for ids in workload.prompt_ids()]
        trainer = PPOTrainer(config, actor, tokens, workload.reward_model(), prompts)
        stack.enter_context(trainer)
        prompt_tokens = workload.samples * sum(map(len, workload.prompt_ids()))

        def step() -> dict:
            row = trainer.step()
            return {
                "phases": row.seconds_by_phase,
                "answer_tokens": row.response_tokens,
                "tokens": prompt_tokens + row.response_tokens,
                "padding": row.padding_fraction,
            }

        serve(step, out)


if __name__ == "__main__":
    main()
