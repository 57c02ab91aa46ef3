"""`icegrt generate`: answer prompts, and print the answers or write them as JSONL."""

from __future__ import annotations

import contextlib

from icegrt.commands.sample import generate
from icegrt.config import GenerateConfig
from icegrt.training.run_folder import rows_file
from icegrt.utils.console import plain, print_info


def run(config: GenerateConfig) -> None:
    """Print each prompt with its answers, or write them to `generate.out`."""
    with rows_file(config.out, [config.prompts]) if config.out else contextlib.nullcontext() as writer:
        count = 0
        for prompt, texts, responses in generate(config):
            count += len(texts)
            if writer is not None:
                reasons = [r.finish_reason for r in responses]
                writer.write({**prompt.row, "responses": texts, "finish_reasons": reasons})
            if config.out:
                continue
            print_info(f"> {plain(prompt.row.get('prompt', prompt.where))}")
            for text in texts:
                print_info(f"{plain(text)}\n")
    if config.out:
        print_info(f"{count} answers: {config.out}")
