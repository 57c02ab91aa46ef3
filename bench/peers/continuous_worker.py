"""Rollouts by continuous batching of transformers: `python -m bench.peers.continuous_worker WORKLOAD DTYPE TOKENS...`.

The model generates the answers of an iteration, from the same prompts and weights as the other providers. It trains
nothing, and runs at the fastest of the batch sizes, TOKENS. With bf16 the weights are bf16: the batching runs in a
thread of its own, which autocast does not reach.
"""

from __future__ import annotations

import time

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from bench.end_to_end.protocol import private_stdout, serve, try_settings
from bench.end_to_end.workloads import PAD, Workload, worker_parser

PAGE = 16


def batching(workload: Workload, tokens: int) -> ContinuousBatchingConfig:
    """Return the settings: `tokens` of a batch at most, and a cache that holds all episodes at once.

    Without a size `transformers` 5.24 takes 60% of the memory of a machine without a GPU for the cache, and its
    attention mask on CPUs has a column for every token of the cache.
    """
    pages = -(-workload.context // PAGE) + 1
    return ContinuousBatchingConfig(page_size=PAGE, num_blocks=workload.episodes * pages, max_batch_tokens=tokens)


def answers(model: torch.nn.Module, workload: Workload, tokens: int) -> list[list[int]]:
    """Return the sampled answers of an iteration, `samples` per prompt.

    Raises:
        RuntimeError: A request failed.
    """
    sampling = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=workload.answer_tokens,
        eos_token_id=workload.stop_ids,
        pad_token_id=PAD,
        num_return_sequences=workload.samples,
    )
    outputs = model.generate_batch(
        workload.prompt_ids(),
        generation_config=sampling,
        continuous_batching_config=batching(workload, tokens),
        persistent_manager=True,
    )
    failed = [output.error for output in outputs.values() if output.error is not None]
    if failed or len(outputs) != workload.episodes:
        reason = failed[0] if failed else "the log has its error"
        raise RuntimeError(f"{workload.episodes - len(outputs) + len(failed)} requests failed: {reason}")
    return [output.generated_tokens for output in outputs.values()]


def main() -> None:
    """Serve rollouts."""
    out = private_stdout()
    parser = worker_parser(__doc__)
    parser.add_argument("tokens", nargs="+", type=int, help="sizes of a batch to try, in tokens")
    options = parser.parse_args()
    workload = options.workload
    model = workload.actor().to(torch.bfloat16 if options.dtype == "bf16" else torch.float32)
    if torch.cuda.is_available():
        model = model.cuda()
    prompt_tokens = workload.samples * sum(map(len, workload.prompt_ids()))

    def step(tokens: int) -> dict:
        begin = time.perf_counter()
        sampled = answers(model, workload, tokens)
        seconds = time.perf_counter() - begin
        answer_tokens = sum(map(len, sampled))
        return {
            "phases": {"rollout": seconds},
            "answer_tokens": answer_tokens,
            "tokens": prompt_tokens + answer_tokens,
        }

    current = ""

    def run(setting: str) -> dict:
        nonlocal current
        if setting != current:  # the manager keeps the size that it was made with
            model.destroy_cached_continuous_batching_manager()
            current = setting
            step(settings[setting])
        return step(settings[setting])

    settings = {f"{tokens} tokens": tokens for tokens in options.tokens}
    seconds = try_settings([*settings], run)
    fastest = min(seconds, key=seconds.__getitem__)
    run(fastest)
    serve(lambda: run(fastest), out, settings=seconds)


if __name__ == "__main__":
    main()
