"""Several answers per prompt from a checkpoint, as JSONL ready for ranking."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from icegrt.checkpoint.directory import list_checkpoints
from icegrt.config import GenerateConfig, SampleConfig
from icegrt.data import ConcatDataset, EncodedDataset, Prompt, PromptEncoder, open_rows, report_lengths, stop_ids
from icegrt.data.examples import Truncation
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.layout import Layout
from icegrt.errors import CheckpointError, ConfigError
from icegrt.model.architecture import DTYPES, Architecture
from icegrt.model.build import build_model, check_parallelism
from icegrt.model.hf.reader import HFCheckpointReader
from icegrt.rewards.compat import adapt
from icegrt.rewards.error_policy import call_reward_function
from icegrt.rewards.function import load_reward_function
from icegrt.rollout.engine import RolloutEngine
from icegrt.rollout.samples import sample_of
from icegrt.rollout.types import Response, Sampling
from icegrt.training.run_folder import rows_file
from icegrt.training.trainer import tokenizer_for
from icegrt.utils.console import print_info, progress

_PROMPTS_AT_ONCE = 4096


def run(config: SampleConfig) -> None:
    """The command: write one row per prompt, with `responses`, `response_ids`, `finish_reasons` (and `scores`)."""
    for key in ("model", "prompts", "out"):
        if not getattr(config, key):
            raise ConfigError(f"sample.{key} is empty; it must be given")
    score, key = None, "sample.score_function"
    if config.score_function:
        score = adapt(load_reward_function(config.score_function, key), key=key)
    with Cluster.open(Layout.of(config.parallel)) as cluster, rows_file(config.out) as writer:
        source = HFCheckpointReader(model_folder(config.model))
        check_parallelism(source.architecture, cluster)
        tokenizer = tokenizer_for(None, source.folder, source.architecture)
        sampling = Sampling.of(config.sampling, config.seed)
        rows = open_rows(config.prompts, config.limit, input_key=config.input_key)
        prompts = prompts_for(source.architecture, tokenizer, rows, sampling, config.truncation, name=config.prompts)
        report_lengths([prompts])
        model = build_model(source, "lm", cluster, dtype=DTYPES[config.dtype]).eval()
        engine = RolloutEngine(
            model, tokenizer, max_batch=config.max_batch, stop_token_ids=_stops(config, source, tokenizer)
        )
        with progress(len(prompts), "sample", "prompts") as bar:
            found = (
                diverse_answers(engine, prompts, config.samples_per_prompt, sampling, config.temperatures)
                if config.temperatures
                else answers(engine, prompts, config.samples_per_prompt, sampling)
            )
            for prompt, responses in found:
                if writer is not None:
                    writer.write(_row(engine, prompt, responses, score))
                bar.advance(1)
    print_info(f"{len(prompts)} prompts x {config.samples_per_prompt} answers: {config.out}")


def prompts_for(
    architecture: Architecture,
    tokenizer: Any,
    rows: Sequence[Any],
    sampling: Sampling,
    truncation: Truncation,
    *,
    chat: bool = True,
    name: str = "prompts",
) -> EncodedDataset[Prompt]:
    """Rows as prompts that leave room for the answer. Raises `DataError` naming the row that does not."""
    context, answer = architecture.context_length, sampling.max_new_tokens
    if answer >= context:
        raise ConfigError(f"max_new_tokens {answer} leaves no room for a prompt in the model's context of {context}")
    why = f"context {context} - max_new_tokens {answer} leaves {context - answer}"
    return EncodedDataset(rows, PromptEncoder(tokenizer, context - answer, truncation, chat=chat, why=why), name)


def _stops(config: SampleConfig | GenerateConfig, source: HFCheckpointReader, tokenizer: Any) -> list[int]:
    return stop_ids(tokenizer, source.architecture.hf_config, source.folder, config.sampling.stop_token_ids)


def answers(
    engine: RolloutEngine, prompts: Sequence[Prompt], samples: int, sampling: Sampling
) -> Iterator[tuple[Prompt, list[Response]]]:
    """Each prompt with all its responses, in the prompts' order, as soon as they are complete."""
    for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
        some = prompts[start : start + _PROMPTS_AT_ONCE]
        held: dict[int, list[Response]] = defaultdict(list)
        following = 0
        for response in engine.stream([p.tokens for p in some], samples, sampling, first_sequence_id=start * samples):
            held[response.prompt_index].append(response)
            while len(held.get(following, ())) == samples:
                yield some[following], sorted(held.pop(following), key=lambda r: r.sample)
                following += 1


def diverse_answers(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    samples: int,
    sampling: Sampling,
    temperatures: Sequence[float],
) -> Iterator[tuple[Prompt, list[Response]]]:
    """As `answers`, but the samples of a prompt take turns at `temperatures`."""
    block = engine.decoder.max_batch
    for start in range(0, len(prompts), block):
        some = prompts[start : start + block]
        columns = []
        for sample in range(samples):
            own = dataclasses.replace(sampling, temperature=temperatures[sample % len(temperatures)])
            first_id = sample * len(prompts) + start
            responses = engine.generate([p.tokens for p in some], 1, own, first_sequence_id=first_id)
            columns.append([dataclasses.replace(r, sample=sample) for r in responses])
        yield from zip(some, (list(row) for row in zip(*columns, strict=True)), strict=True)


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
    """Answers to `generate.prompt` and `generate.prompts`: the prompt, the texts, the responses."""
    if not config.model:
        raise ConfigError("generate.model is empty; name a checkpoint")
    sources = [open_rows([{"prompt": text} for text in config.prompt])] if config.prompt else []
    sources += [open_rows(config.prompts, input_key=config.input_key)] if config.prompts else []
    if not sources:
        raise ConfigError("nothing to answer: give generate.prompt='[\"...\"]' or generate.prompts=FILE")
    with Cluster.open(Layout.of(config.parallel)) as cluster:
        source = HFCheckpointReader(model_folder(config.model))
        check_parallelism(source.architecture, cluster)
        tokenizer = tokenizer_for(None, source.folder, source.architecture)
        sampling = Sampling.of(config.sampling, config.seed)
        parts = [
            prompts_for(source.architecture, tokenizer, rows, sampling, config.truncation, chat=config.chat)
            for rows in sources
        ]
        model = build_model(source, "lm", cluster, dtype=DTYPES[config.dtype]).eval()
        engine = RolloutEngine(
            model, tokenizer, max_batch=config.max_batch, stop_token_ids=_stops(config, source, tokenizer)
        )
        for prompt, responses in answers(engine, ConcatDataset(parts), config.samples_per_prompt, sampling):
            yield prompt, [engine.text(r) for r in responses], responses


def model_folder(path: str) -> str:
    """A checkpoint's folder: `path` itself, or the exported model of the run at `path`."""
    if (Path(path) / "config.json").is_file():
        return path
    exported = Path(path) / "model"
    if not exported.is_dir() and list_checkpoints(path):
        raise CheckpointError(
            f"{path}: an unfinished run, which has no model yet; finish it with --resume, or export its last "
            f"checkpoint: icegrt export export.run={path} export.out=FOLDER"
        )
    return str(exported) if exported.is_dir() else path
