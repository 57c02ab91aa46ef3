"""Sources of reward on data-parallel ranks: each scores its own responses, and the figures are of all of them."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from icegrt.ppo.metrics import source_metrics
from icegrt.ppo.rewards import RewardOutputs
from icegrt.ppo.scores import ModelScores
from icegrt.rewards.sample import RewardResult, Sample
from icegrt.rewards.sources import SourceScores

SAMPLE = Sample("a", [5], "q", [2], "stop", {}, "row 0", 0)
# Scores by rank, None where the source failed; a metric that only rank 1 has; rank 2 has no response at all.
SCORES = {0: [1.0, 2.0, None], 1: [6.0], 2: []}


def rewards(rank):
    metrics = {"length": 4.0} if rank == 1 else {}
    results = [RewardResult(score, {} if score is None else metrics) for score in SCORES[rank]]
    errors = ["no" if score is None else None for score in SCORES[rank]]
    models = [ModelScores("reward_model", 1.0, torch.tensor([float(rank)] * len(results)))]
    return RewardOutputs([SAMPLE] * len(results), models, [SourceScores("f", 1.0, results, errors)])


def worker(rank, world, path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    figures = source_metrics(rewards(rank), None)
    assert figures["reward_errors"] == 1 and figures["dropped_responses"] == 1
    f = figures["sources"]["f"]
    assert (f["score_mean"], f["errors"]) == (3.0, 1) and math.isclose(f["score_std"], math.sqrt(14 / 3))
    assert (f["metrics/length_mean"], f["metrics/length_std"]) == (4.0, 0.0)
    assert math.isclose(figures["sources"]["reward_model"]["score_mean"], 1 / 3)  # the dropped one does not count
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [3])
def test_figures_are_of_all_ranks(tmp_path, world):
    mp.spawn(worker, (world, tmp_path / "store"), nprocs=world)
