"""`icegrt sample`: several answers per prompt from a checkpoint, as JSONL ready for ranking."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from icegrt.config import GenerateConfig, SampleConfig
from icegrt.data import ConcatDataset, EncodedDataset, Prompt, Row, open_rows, report_lengths, stop_ids
from icegrt.data.training_data import encode_prompts
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.layout import Layout
from icegrt.errors import ConfigError
from icegrt.model.architecture import DTYPES
from icegrt.model.build import build_model, check_parallelism
from icegrt.model.hf import loader
from icegrt.model.hf.reader import HFCheckpointReader
from icegrt.rewards.compat import adapt
from icegrt.rewards.error_policy import call_reward_function
from icegrt.rewards.function import load_reward_function
from icegrt.rollout.engine import RolloutEngine
from icegrt.rollout.samples import sample_of
from icegrt.rollout.settings import RolloutSettings
from icegrt.rollout.types import Response, Sampling
from icegrt.training.inputs import tokenizer_for
from icegrt.training.run_folder import rows_file
from icegrt.utils.console import print_info, progress
from icegrt.utils.cpu import warn_of_slow_bf16

_CHUNK_PROMPTS = 4096


def run(config: SampleConfig) -> None:
    """Write one row per prompt, with `responses`, `response_ids`, `finish_reasons` (and `scores`)."""
    for key in ("model", "prompts", "out"):
        if not getattr(config, key):
            raise ConfigError(f"sample.{key} is empty; it must be given")
    score, key = None, "sample.score_function"
    if config.score_function:
        score = adapt(load_reward_function(config.score_function, key), key=key)
    inputs = [config.prompts, config.score_function.rpartition(":")[0]]
    with Cluster.open(Layout.of(config.parallel)) as cluster, rows_file(config.out, inputs) as writer:
        reader, tokenizer = _open_model(config, cluster)
        rows = open_rows(config.prompts, config.limit, input_key=config.input_key)
        prompts = _encode(config, reader, tokenizer, rows, name=config.prompts)
        report_lengths([prompts])
        engine = _build_rollout_engine(config, reader, tokenizer, cluster)
        sampling = Sampling.of(config.sampling, config.seed)
        if config.temperatures:
            answered = diverse_answers(engine, prompts, config.samples_per_prompt, sampling, config.temperatures)
        else:
            answered = answers(engine, prompts, config.samples_per_prompt, sampling)
        with progress(len(prompts), "sample", "prompts") as bar:
            for prompt, responses in answered:
                if writer is not None:
                    writer.write(_row(engine, prompt, responses, score))
                bar.advance(1)
    print_info(f"{len(prompts)} prompts x {config.samples_per_prompt} answers: {config.out}")


def _open_model(config: SampleConfig | GenerateConfig, cluster: Cluster) -> tuple[HFCheckpointReader, Any]:
    reader = HFCheckpointReader(config.model)
    loader.check(reader, "lm")  # before data is encoded, which may take long
    check_parallelism(reader.architecture, cluster)
    return reader, tokenizer_for(None, reader.folder, reader.architecture)


def _encode(
    config: SampleConfig | GenerateConfig,
    reader: HFCheckpointReader,
    tokenizer: Any,
    rows: Sequence[Row],
    **options: Any,
) -> EncodedDataset[Prompt]:
    return encode_prompts(
        rows,
        tokenizer,
        context=reader.architecture.context_length,
        max_new_tokens=config.sampling.max_new_tokens,
        key=f"{config.section}.sampling.max_new_tokens",
        truncation=config.truncation,
        **options,
    )


def _build_rollout_engine(
    config: SampleConfig | GenerateConfig, reader: HFCheckpointReader, tokenizer: Any, cluster: Cluster
) -> RolloutEngine:
    hf_config, folder = reader.architecture.hf_config, reader.folder
    stops = stop_ids(tokenizer, hf_config, folder, config.sampling.stop_token_ids)
    warn_of_slow_bf16(DTYPES[config.dtype], cluster.device, f"{config.section}.dtype")
    model = build_model(reader, "lm", cluster, dtype=DTYPES[config.dtype]).eval()
    settings = RolloutSettings.of(config.rollout, config.max_batch)
    return RolloutEngine(model, tokenizer, stop_token_ids=stops, settings=settings)


def answers(
    engine: RolloutEngine, prompts: Sequence[Prompt], samples: int, sampling: Sampling
) -> Iterator[tuple[Prompt, list[Response]]]:
    """Yield each prompt with all its responses, in the order of the prompts, as soon as they are complete."""
    for start in range(0, len(prompts), _CHUNK_PROMPTS):
        chunk = prompts[start : start + _CHUNK_PROMPTS]
        unfinished: dict[int, list[Response]] = defaultdict(list)
        next_prompt = 0
        for response in engine.stream([p.tokens for p in chunk], samples, sampling, first_sequence_id=start * samples):
            unfinished[response.prompt_index].append(response)
            while len(unfinished.get(next_prompt, ())) == samples:
                yield chunk[next_prompt], sorted(unfinished.pop(next_prompt), key=lambda r: r.sample)
                next_prompt += 1


def diverse_answers(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    samples: int,
    sampling: Sampling,
    temperatures: Sequence[float],
) -> Iterator[tuple[Prompt, list[Response]]]:
    """Yield as `answers` does; sample i of a prompt has temperature i of `temperatures`, modulo their number."""
    chunk_size = engine.decoder.settings.max_batch
    for start in range(0, len(prompts), chunk_size):
        chunk = prompts[start : start + chunk_size]
        responses_by_sample = []
        for sample in range(samples):
            tempered = dataclasses.replace(sampling, temperature=temperatures[sample % len(temperatures)])
            first_id = sample * len(prompts) + start
            responses = engine.generate([p.tokens for p in chunk], 1, tempered, first_sequence_id=first_id)
            responses_by_sample.append([dataclasses.replace(r, sample=sample) for r in responses])
        yield from zip(chunk, map(list, zip(*responses_by_sample, strict=True)), strict=True)


def _row(engine: RolloutEngine, prompt: Prompt, responses: list[Response], score) -> dict[str, Any]:
    samples = [sample_of(engine.tokenizer, response, prompt) for response in responses]
    row = {
        **prompt.row,
        "responses": [sample.text for sample in samples],
        "response_ids": [r.tokens for r in responses],
        "finish_reasons": [r.finish_reason for r in responses],
    }
    if score is not None:
        row["scores"] = call_reward_function(score, samples)
    return row


def generate(config: GenerateConfig) -> Iterator[tuple[Prompt, list[str], list[Response]]]:
    """Answer `generate.prompt` and `generate.prompts`; yield each prompt, the texts and the responses."""
    if not config.model:
        raise ConfigError("generate.model is empty; name a checkpoint")
    sources = [open_rows([{"prompt": text} for text in config.prompt])] if config.prompt else []
    sources += [open_rows(config.prompts, input_key=config.input_key)] if config.prompts else []
    if not sources:
        raise ConfigError("nothing to answer: give generate.prompt='[\"...\"]' or generate.prompts=FILE")
    with Cluster.open(Layout.of(config.parallel)) as cluster:
        reader, tokenizer = _open_model(config, cluster)
        prompts = ConcatDataset([_encode(config, reader, tokenizer, rows, chat=config.chat) for rows in sources])
        engine = _build_rollout_engine(config, reader, tokenizer, cluster)
        sampling = Sampling.of(config.sampling, config.seed)
        for prompt, responses in answers(engine, prompts, config.samples_per_prompt, sampling):
            yield prompt, [engine.text(r) for r in responses], responses
