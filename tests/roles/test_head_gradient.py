"""The gradient of the LM head is summed in fp32 over micro-batches, whatever the dtype of the weights."""

from functools import partial
from unittest import mock

import pytest
import torch

from icegrt.config import OptimizerConfig, ParallelConfig, PPOConfig
from icegrt.distributed.cluster import Cluster
from icegrt.distributed.layout import Layout
from icegrt.model.pipeline_model import PipelineModel
from icegrt.packing import pack
from icegrt.ppo.batch_plan import ActionBatch
from icegrt.ppo.losses import PolicyLoss, PtxLoss
from icegrt.ppo.scoring import LogprobScorer
from icegrt.roles import role as roles
from icegrt.roles.micro_batch import MicroBatch
from icegrt.roles.optimizer import wrap
from tests.helpers import tiny_models as tiny
from tests.helpers.ranks import launch

MICRO_BATCHES = 12
SCORER = LogprobScorer(1.0, 8)


def work(actor):
    """Return micro-batches of the policy loss with ptx text between them, and the number of actions."""
    generator = torch.Generator().manual_seed(0)
    items, actions = [], 0
    for n in range(MICRO_BATCHES):
        tokens = torch.randint(2, tiny.VOCAB, (3, 9 + n), generator=generator).tolist()
        batch = pack([row[:3] for row in tokens], [row[3:] for row in tokens], tail_multiple=2)
        draws_A = torch.randn(2, batch.n_actions, generator=generator)
        streams = {"old_logprob_A": draws_A[0] - 3, "advantage_A": draws_A[1]}
        if n % 4 == 2:  # a second use of the head in one micro-batch
            streams |= {"positive_index_P": torch.arange(2, 7), "positive_scale": 1.5}
        policy = batch.extended(ActionBatch, **streams)
        config = PPOConfig(entropy_coef=0.05, positive_nll_coef=0.4)
        items.append(MicroBatch(policy, PolicyLoss(config, actor, 0.0, None, SCORER)))
        actions += batch.n_actions
        if n % 4 == 1:
            items.append(MicroBatch(batch, PtxLoss(actor, 0.3, 8)))
    return items, actions


def accumulated(actor, head, weight_and_grad=None):
    """Return the sum of the head's gradients over all micro-batches; `weight_and_grad` replaces the model's choice."""
    items, actions = work(actor)
    choice = weight_and_grad or PipelineModel.lm_weight_and_grad
    with mock.patch.object(PipelineModel, "lm_weight_and_grad", choice):
        actor.zero_gradients()
        actor.accumulate(items)
    return None if head is None else head.main_grad.double() * actions


def exact(actor):
    """Return the sum of the gradients that the micro-batches have in fp32, from the same hidden states."""
    parts = []

    def in_fp32(item, hidden_TH, batch):
        weight_VH = actor.model.lm_weight_VH.detach().float().requires_grad_()
        with (
            mock.patch.object(PipelineModel, "lm_weight_and_grad", lambda model: (weight_VH, None)),
            torch.enable_grad(),
        ):
            item.loss(hidden_TH.detach().float(), batch).sum.backward()
        parts.append(weight_VH.grad.double())
        return (hidden_TH[:1, 0],)

    items, _ = work(actor)
    for item in items:
        actor.score([item.batch], partial(in_fp32, item), lambda batch: (1,))
    return torch.stack(parts).sum(0) if parts else None


def errors(layout, tied, overlap, out):
    """Write the relative errors of the head's gradient: as the engine sums it, and as autograd would."""
    if overlap:
        roles.wrap = partial(wrap, overlap=True, bucket_size=4000)
    with Cluster.open(Layout.of(ParallelConfig(**layout))) as cluster:
        source = tiny.causal_lm(0, "qwen2" if tied else "llama", tie_word_embeddings=tied)
        actor = tiny.role(source, learns=OptimizerConfig(), dtype=torch.bfloat16)
        is_last = cluster.rank == cluster.world_size - 1 or "pipeline" not in layout
        head = actor.model.lm_weight_VH if is_last else None
        truth = exact(actor)
        engine = accumulated(actor, head)
        autograd = accumulated(actor, head, lambda model: (model.lm_weight_VH, None))
        # On one pipeline stage the embedding's part of a tied gradient comes on top.
        embedding = 0.0
        if tied and "pipeline" not in layout:
            embedding = accumulated(actor, head, lambda model: (model.lm_weight_VH.detach(), None))
        if head is not None:
            norm = truth.norm()
            figures = [float((x - embedding - truth).norm() / norm) for x in (engine, autograd)]
            torch.save((figures, actor.ddps[-1].ddp_config.overlap_grad_reduce), out / f"{cluster.rank}.pt")


@pytest.mark.parametrize(
    ("ranks", "layout", "tied", "overlap"),
    [
        (1, {}, False, False),
        (1, {}, True, False),
        (1, {}, False, True),
        (1, {}, True, True),
        (2, {"tensor": 2}, False, False),
        (2, {"tensor": 2, "sequence_parallel": True}, True, True),
        (2, {"pipeline": 2}, False, False),
    ],
)
def test_bf16_heads_accumulate_in_fp32(ranks, layout, tied, overlap, tmp_path):
    launch(ranks, errors, layout, tied, overlap, tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == (1 if "pipeline" in layout else ranks)
    for file in files:
        (engine, autograd), is_overlapped = torch.load(file)
        assert is_overlapped == overlap
        assert engine < 1e-6 < 1e-4 < autograd, (engine, autograd)


def test_fp32_heads_leave_their_gradient_to_autograd(cluster):
    actor = tiny.role(tiny.causal_lm(0), learns=OptimizerConfig())
    weight, buffer = actor.model.lm_weight_and_grad()
    assert weight is actor.model.lm_weight_VH and buffer is None
    with torch.no_grad():
        half = tiny.role(tiny.causal_lm(0), learns=OptimizerConfig(), dtype=torch.bfloat16)
        assert half.model.lm_weight_and_grad() == (half.model.lm_weight_VH, None)
