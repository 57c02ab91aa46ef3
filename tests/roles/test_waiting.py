"""Where the host waits for the device: nowhere within a micro-batch, once at the end of a pass, twice per step.

The meta device stands for a GPU, so every wait and every copy is counted and nothing is computed.
"""

import dataclasses
from itertools import count

import pytest
import torch

from icegrt.config import OptimizerConfig, PPOConfig
from icegrt.distributed.layout import Layout
from icegrt.distributed.pipeline import fetch
from icegrt.kernels import Moments
from icegrt.model.architecture import Architecture
from icegrt.model.build import build_parallel_model
from icegrt.packing import pack
from icegrt.ppo import experience
from icegrt.ppo.batch_plan import ActionBatch, plan_batches
from icegrt.ppo.losses import CriticLoss, PolicyLoss, PtxLoss
from icegrt.ppo.scores import Scores
from icegrt.ppo.scoring import LogprobScorer, score_sequences, score_values
from icegrt.roles.micro_batch import MicroBatch, merge_by_type
from icegrt.roles.role import Role, TrainableRole
from icegrt.training.ranking_loss import RankedBatch, RewardModelLoss
from icegrt.training.sft_loss import SFTLoss
from tests.helpers import tiny_models as tiny
from tests.helpers.rehearsals import copies_to_device, played_rank

# Megatron warns in its pipeline schedule, and of parameters that are gathered again because no step came between.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:The next bucket's parameter all-gather"),
]
META = torch.device("meta")
MICRO_BATCHES, CHUNK = 4, 64
SCORER = LogprobScorer(1.0, CHUNK)


LAYOUTS = {
    "pp2": (Layout(pipeline=2), False),
    "tp2-virtual": (Layout(tensor=2, pipeline=2, virtual_pipeline=2), True),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def roles(request):
    """Actor, critic and reference of the last of four ranks, which has the heads."""
    layout, tied = LAYOUTS[request.param]
    changes = {"tie_word_embeddings": tied, "num_hidden_layers": layout.stages}
    architecture = Architecture.from_config(tiny.model_config("qwen2", **changes).to_dict())
    with played_rank(layout, 3, 4) as (cluster, watcher):

        def model(head):
            return build_parallel_model(architecture, head, cluster, dtype=torch.bfloat16)

        names = count()
        yield {
            "watch": lambda: watcher.phase(f"block {next(names)}"),
            "actor": TrainableRole("actor", model("lm"), OptimizerConfig(), 10),
            "critic": TrainableRole("critic", model("scalar"), OptimizerConfig(), 10),
            "reference": Role("reference", model("lm")),
        }


@pytest.fixture(params=[False, True], ids=["all-count", "masked"])
def batches(request):
    """Micro-batches with every column that a loss reads. They differ in length."""
    built = []
    for length in range(30, 30 + MICRO_BATCHES):
        masks = [[n % 3 > 0 for n in range(length)]] * 4 if request.param else None
        batch = pack([[1] * 20] * 4, [[2] * length] * 4, action_masks=masks)
        zeros_A = torch.zeros(batch.n_actions)
        streams = ("old_logprob_A", "ref_logprob_A", "advantage_A", "old_value_A", "return_A")
        built.append(batch.extended(ActionBatch, **dict.fromkeys(streams, zeros_A)))
    return built


def ranked(batches):
    pair = torch.tensor([0])
    columns = {"winners_P": pair, "losers_P": pair + 1, "weight_P": torch.ones(1), "margin_P": torch.ones(1)}
    return [batch.extended(RankedBatch, **columns, prompts=1, all_pairs=1) for batch in batches]


def check_one_copy_each(watch, expected=MICRO_BATCHES):
    assert copies_to_device(watch) == (0, expected), watch.copies


def test_inference_waits_for_nothing(roles, batches):
    passes = [
        lambda: SCORER(roles["actor"], batches, entropy=True),
        lambda: SCORER(roles["reference"], batches),
        lambda: score_values(roles["critic"], batches),
        lambda: score_sequences(roles["critic"], batches),
    ]
    for run in passes:
        with roles["watch"]() as watch:
            results = run()
        assert watch.syncs == {}
        check_one_copy_each(watch)
        assert all(x is None or x.device == META for x in results)


def losses(roles, batches):
    """Return by name a role and its micro-batches for every loss of every stage."""
    actor, critic, config = roles["actor"], roles["critic"], PPOConfig(kl_in="loss", entropy_coef=0.01)
    policy = PolicyLoss(config, actor, 0.1, Moments(*torch.ones(3, device=META)), SCORER, may_clip=False)
    work = {
        "policy": (actor, batches, policy),
        "ptx": (actor, batches, PtxLoss(actor, 0.1, CHUNK)),
        "sft": (actor, batches, SFTLoss(actor, CHUNK)),
        "value": (critic, batches, CriticLoss(critic, 0.2)),
        "ranking": (critic, ranked(batches), RewardModelLoss(critic)),
    }
    return {name: (role, [MicroBatch(b, loss) for b in rows]) for name, (role, rows, loss) in work.items()}


def test_forward_and_backward_of_every_loss_wait_for_nothing(roles, batches):
    for name, (role, work) in losses(roles, batches).items():
        role.zero_gradients()
        with roles["watch"]() as watch:
            stats, sums = role.accumulate(work)
            merged = merge_by_type(stats)
        assert watch.syncs == {}, name
        check_one_copy_each(watch)
        assert len(sums) == MICRO_BATCHES and all(x.device == META for x in sums)
        with roles["watch"]() as watch:
            fetched = fetch(merged)
        assert sum(watch.syncs.values()) == 1, name
        tensors = [x for s in fetched.values() for x in vars(s).values() if isinstance(x, torch.Tensor)]
        assert tensors and all(x.device.type == "cpu" for x in tensors)


def test_clipped_rows_cost_one_wait_per_chunk_and_nothing_else_does(roles, batches):
    actor = roles["actor"]
    loss = PolicyLoss(PPOConfig(), actor, 0.0, None, SCORER)
    actor.zero_gradients()
    with roles["watch"]() as watch:
        actor.accumulate([MicroBatch(batch, loss) for batch in batches])
    chunks = sum(-(-batch.n_counted_actions // CHUNK) for batch in batches)
    assert sum(watch.syncs.values()) == chunks
    assert all((reason, site.function) == ("nonzero", "_active_rows") for reason, site in watch.syncs)


@pytest.mark.parametrize("name", ["policy", "ranking"])
def test_a_step_waits_for_its_verdict_and_its_norm(roles, batches, name):
    role, work = losses(roles, batches)[name]
    with roles["watch"]() as watch:
        role.train_step(work)
    assert sum(watch.syncs.values()) == 2, watch.syncs
    check_one_copy_each(watch)


def test_the_optimizer_reads_one_number_whatever_the_number_of_parameters(roles):
    optimizer = roles["actor"].optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(parameters) > 3
    with roles["watch"]() as watch:
        optimizer.step()
    assert list(watch.syncs.values()) == [1]
    # Multi-tensor kernels: Adam's operations run once per group of parameters.
    groups = sum(bool(group["params"]) for group in optimizer.param_groups)
    assert sum(n for (operator, _), n in watch.launches.items() if "_foreach_lerp_" in operator) == groups


def test_advantages_are_computed_where_the_values_are(roles, monkeypatch):
    responses = tiny.responses(9)
    plan = plan_batches(responses, 48).with_masked(torch.arange(9) == 4)
    actions, arguments = sum(len(r.tokens) for r in responses), []

    def kernel(*args, **kwargs):
        arguments.extend([*args, kwargs["bootstrap_N"], kwargs["mask_A"], kwargs["token_reward_A"]])

    monkeypatch.setattr(experience, "shaped_gae", kernel)
    stream_A, scores = torch.empty(actions, device=META), Scores(torch.zeros(9), [], None)
    config = PPOConfig(bootstrap_truncated=True)
    with roles["watch"]() as watch:
        experience.compute_advantages(
            config, 0.1, plan, scores, stream_A, stream_A, stream_A, stream_A[:9], torch.zeros(actions)
        )
    assert watch.syncs == {}
    check_one_copy_each(watch, 1)
    assert len(arguments) == 8 and all(x.device == META for x in arguments)


@pytest.mark.parametrize("wait", ["item", "cpu", "nonzero", "copy", "tensor"])
def test_the_watcher_sees_a_planted_wait(roles, batches, wait):
    role = roles["critic"]
    planted = {
        "item": lambda x: x.sum().item(),
        "cpu": lambda x: x.cpu(),
        "nonzero": lambda x: x.nonzero(),
        "copy": lambda x: torch.ones(3).to(META),
        "tensor": lambda x: torch.tensor([1, 2], device=META),
    }

    def read(hidden_TH, batch):
        planted[wait](hidden_TH)
        return (role.model.head(hidden_TH[batch.last_rows_N]),)

    with roles["watch"]() as watch:
        role.score(batches, read, lambda batch: (batch.n_sequences,))
    blocking, _ = copies_to_device(watch)
    assert (blocking if wait in ("copy", "tensor") else sum(watch.syncs.values())) == MICRO_BATCHES


def test_a_batch_knows_its_lengths_wherever_it_is(roles, batches):
    batch = batches[0]
    with roles["watch"]() as watch:
        moved = batch.to(META, non_blocking=True)
        figures = (moved.n_sequences, moved.n_tokens, moved.n_actions, moved.n_counted_actions)
        parts = moved.split_actions(moved.action_tokens_A)
    assert watch.syncs == {}
    check_one_copy_each(watch, 1)
    assert figures == (batch.n_sequences, batch.n_tokens, batch.n_actions, batch.n_counted_actions)
    assert (moved.lengths, moved.response_lengths) == ([50] * 4, [30] * 4) and [len(p) for p in parts] == [30] * 4
    for field in dataclasses.fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if isinstance(before, torch.Tensor):
            assert (after.device, after.dtype, after.shape) == (META, before.dtype, before.shape)
