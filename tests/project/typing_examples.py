"""Code as users write it, for type checkers; never run.

Each `type: ignore` marks a mistake. A checker that misses the mistake reports the comment as unused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import assert_type

import icegrt
from icegrt import packing
from icegrt.config import DataSource, OptimizerConfig, RunConfig
from icegrt.kernels import (
    PPOLoss,
    ShapedGAE,
    TokenLogprobs,
    linear_logprobs,
    linear_ppo_loss,
    masked_moments,
    shaped_gae,
    whiten,
)
from icegrt.model.pipeline_model import PipelineModel


def configurations() -> None:
    config = icegrt.PPOConfig(kl_coef=0.1, kl_in="loss", dual_clip=None)
    assert_type(config.kl_coef, float)
    assert_type(config.kl_in, Literal["reward", "loss"])
    assert_type(config.run, RunConfig)
    assert_type(config.optimizer.lr, float)
    assert_type(config.ptx_data, list[DataSource])
    icegrt.PPOConfig(run={"dir": "runs/a"}, optimizer=OptimizerConfig(lr=1e-6), ptx_data=[{"path": "a.jsonl"}])
    assert_type(icegrt.PPOConfig.load("ppo.yaml", ["ppo.kl_coef=0.1"]), icegrt.PPOConfig)
    assert_type(icegrt.ExportConfig.load(), icegrt.ExportConfig)

    icegrt.PPOConfig(kl_coeff=0.1)  # type: ignore[call-arg]
    icegrt.PPOConfig(kl_coef="x")  # type: ignore[arg-type]
    icegrt.PPOConfig(kl_in="losses")  # type: ignore[arg-type]
    icegrt.PPOConfig(run="runs/a")  # type: ignore[arg-type]
    icegrt.PPOConfig("path/to/hf")  # type: ignore[call-arg]
    config.kl_coef = 0.2  # type: ignore[misc]
    config.kl_coeff  # type: ignore[attr-defined]  # noqa: B018


def score(samples: list[icegrt.Sample]) -> list[float | icegrt.RewardResult]:
    assert_type(samples[0].finish_reason, Literal["stop", "length"])
    samples[0].answer  # type: ignore[attr-defined]  # noqa: B018
    icegrt.RewardResult("good")  # type: ignore[arg-type]
    return [icegrt.RewardResult(1.0, {"length": len(s.tokens)}) if s.row["topic"] == "ad" else 0.0 for s in samples]


def trl_reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return [float(len(text)) for text in completions]


class Watch(icegrt.Callback):
    def on_rollout(self, trainer: icegrt.PPOTrainer, responses: list[icegrt.Response]) -> None:
        trainer.total_steps = trainer.done_steps

    def on_update(self, trainer: icegrt.PPOTrainer, step: icegrt.PPOStep) -> None:
        print(step.iteration, step.score_mean)


class Half:
    def on_checkpoint(self, trainer: icegrt.SFTTrainer, path: Path) -> None: ...


def ppo(config: icegrt.PPOConfig, model: torch.nn.Module, rows: list[dict[str, str]]) -> None:
    with icegrt.PPOTrainer(config, "path/to/hf", reward=score, prompts=rows, callbacks=[Watch(), Half()]) as trainer:
        assert_type(trainer, icegrt.PPOTrainer)
        assert_type(trainer.config, icegrt.PPOConfig)
        for step in trainer:
            assert_type(step, icegrt.PPOStep)
            assert_type(step.score_mean, float)
            assert_type(step.reward_model_score_mean, float | None)
            assert_type(step.evaluation, icegrt.Evaluation | None)
            step.mean_score  # type: ignore[attr-defined]  # noqa: B018
        assert_type(trainer.step(), icegrt.PPOStep)
        assert_type(trainer.evaluate(), icegrt.Evaluation)
        assert_type(trainer.train(), dict[str, Any])
        assert_type(trainer.save_pretrained("out"), Path)

    icegrt.PPOTrainer(config, reward=[score, (trl_reward, 0.5), "https://scorer", Path("rm")], prompts="prompts.jsonl")
    icegrt.PPOTrainer(config, reward=(score, 2.0), prompts=iter(rows), eval_prompts=Path("held_out.parquet"))
    icegrt.PPOTrainer(config, 3)  # type: ignore[arg-type]
    icegrt.PPOTrainer(config, tokenizer=model)  # type: ignore[arg-type]
    icegrt.PPOTrainer(config, prompts=["a text"])  # type: ignore[arg-type]
    icegrt.PPOTrainer(config, reward=0.5)  # type: ignore[arg-type]
    icegrt.PPOTrainer(icegrt.SFTConfig())  # type: ignore[arg-type]


def stages(sft_config: icegrt.SFTConfig, reward_config: icegrt.RewardConfig, rows: Iterator[dict[str, Any]]) -> None:
    sft = icegrt.SFTTrainer(sft_config, "path/to/hf", data=rows, heldout="held_out.jsonl")
    for sft_step in sft:
        assert_type(sft_step, icegrt.SFTStep)
    assert_type(sft.evaluate(), float | None)
    with icegrt.RewardTrainer(reward_config, data=rows) as trainer:
        assert_type(trainer, icegrt.RewardTrainer)
        for reward_step in trainer:
            assert_type(reward_step, icegrt.RewardStep)
            assert_type(reward_step.heldout_accuracy, float | None)
    icegrt.RewardTrainer(sft_config)  # type: ignore[arg-type]


def rollouts(tokenizer: Any, prompts: list[str]) -> None:
    model = icegrt.load_actor("path/to/hf", dtype="bf16")
    assert_type(model, PipelineModel)
    engine = icegrt.RolloutEngine(model, tokenizer, max_batch=64, stop_token_ids=[2])
    for response in engine.stream(prompts, n=4, sampling=icegrt.Sampling(temperature=0.7, seed=1)):
        assert_type(response, icegrt.Response)
        assert_type(response.logprobs, list[float])
        assert_type(engine.text(response), str)
    assert_type(engine.generate([[1, 2], "text"]), list[icegrt.Response])
    icegrt.load_actor("path/to/hf", dtype="fp8")  # type: ignore[arg-type]
    icegrt.Sampling(temprature=1.0)  # type: ignore[call-arg]


def errors() -> None:
    try:
        icegrt.PPOConfig.load("ppo.yaml")
    except (icegrt.ConfigError, icegrt.DataError, icegrt.CheckpointError) as error:
        assert_type(error, icegrt.ConfigError | icegrt.DataError | icegrt.CheckpointError)
    except icegrt.UserError:
        raise
    assert_type(icegrt.__version__, str)
    icegrt.PPOTrainr  # type: ignore[attr-defined]  # noqa: B018


def packed(prompts: list[list[int]], responses: list[Tensor]) -> None:
    batch = packing.pack(prompts, responses, tail_multiple=8)
    assert_type(batch, packing.PackedBatch)
    assert_type(batch.to("cuda").tokens_T, Tensor)
    assert_type(packing.unpack(batch), tuple[list[Tensor], list[Tensor]])
    plan = packing.balance([3, 5, 8], token_budget=16, ranks=2)
    assert_type(plan.assignments, tuple[tuple[tuple[int, ...], ...], ...])
    packing.balance([3, 5, 8])  # type: ignore[call-arg]
    packing.pack(["text"], [[1]])  # type: ignore[list-item]


def kernels(hidden_AH: Tensor, weight_VH: Tensor, token_A: Tensor, old_A: Tensor, score_N: Tensor) -> None:
    logprobs = linear_logprobs(hidden_AH, weight_VH, token_A, entropy=True)
    assert_type(logprobs, TokenLogprobs)
    assert_type(logprobs.entropy_A, Tensor | None)
    shaped = shaped_gae(score_N, old_A, logprobs.logprob_A, None, token_A, kl_coef=0.1)
    assert_type(shaped, ShapedGAE)
    advantage_A = whiten(shaped.advantage_A, masked_moments(shaped.advantage_A))
    loss = linear_ppo_loss(hidden_AH, weight_VH, token_A, old_A, advantage_A, normalizer=1.0)
    assert_type(loss, PPOLoss)
    assert_type(loss.stats.clipped_sum, Tensor)
    whiten(shaped.advantage_A)  # type: ignore[call-arg]
    turns = shaped_gae(score_N, old_A, old_A, None, token_A, kl_coef=0, lam=score_N, lam_value=1.0, unit="turn")
    assert_type(turns.value_mask_A, Tensor | None)
    shaped_gae(score_N, old_A, old_A, None, token_A, kl_coef="adaptive")  # type: ignore[arg-type]
    shaped_gae(score_N, old_A, old_A, None, token_A, kl_coef=0, unit="word")  # type: ignore[arg-type]
    loss.losses  # type: ignore[attr-defined]  # noqa: B018
