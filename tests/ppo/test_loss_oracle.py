"""Corrections, aggregations and the positive-example loss, against float64 loops written from the formulas."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icegrt.kernels import Moments, PolicyStats, ShapedGAE
from icegrt.packing import pack
from icegrt.ppo.batch_plan import BatchPlan, plan_batches
from icegrt.ppo.corrections import anchor_of_sequence_ratio, behaviour_ratio, effective_share, truncated_weight
from icegrt.ppo.experience import Experience
from icegrt.ppo.loss_weights import loss_weights, right_responses
from icegrt.ppo.losses import PolicyNLLStats
from icegrt.ppo.scores import overlong_penalty
from icegrt.ppo.scoring import LogprobScorer
from icegrt.ppo.update import Updater
from icegrt.roles.micro_batch import merge_by_type
from icegrt.rollout.types import Response
from tests.helpers import tiny_models as tiny
from tests.ppo.test_oracle import token_terms

SCORER = LogprobScorer(1.0, 16)
ALONE = SimpleNamespace(all_reduce_sum=list)  # one rank: a sum over ranks is its own

CASES = {
    "tis of tokens": {"correction": "tis", "tis_cap": 1.1},
    "tis of responses": {"correction": "tis", "correction_level": "sequence", "tis_cap": 1.1},
    "dis of tokens": {"correction": "dis", "dis_low": 0.2, "dis_high": 0.4},
    "dis of responses": {"correction": "dis", "correction_level": "sequence", "dis_low": 0.1, "dis_high": 0.1},
    "dis with every term": {"correction": "dis", "kl_in": "loss", "kl_coef": 0.3, "entropy_coef": 0.05},
    "mean of responses": {"loss_aggregation": "sequence"},
    "a constant": {"loss_aggregation": "constant", "loss_constant": 5},
    "the longest length": {"loss_aggregation": "constant"},
    "positive examples": {"positive_nll_coef": 0.3},
    "positive by the total score": {
        "positive_nll_coef": 0.3, "positive_nll_score": "total", "positive_nll_threshold": 1.5,
    },
    "all together": {
        "correction": "tis", "loss_aggregation": "sequence", "positive_nll_coef": 0.1, "entropy_coef": 0.05,
        "tis_cap": 1.1,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def scored(cluster):
    """Two minibatches of answers, one of them dropped; the actor that sampled moved a little; every log-prob."""
    base = tiny.causal_lm(0)
    moved = tiny.nudged(base, 0.02)
    noise = torch.Generator().manual_seed(4)
    weights, drawn = tiny.doubles(base), []
    for response in tiny.responses(10, seed=8):
        with torch.no_grad():
            exact = torch.stack([x for x, _ in token_terms(weights, base.config, response, 1.0)])
        rollout = exact + 0.15 * torch.randn(exact.shape, generator=noise)
        drawn.append(replace(response, logprobs=rollout.tolist()))
    plan = plan_batches(drawn, 40, 2)
    dropped_N = torch.tensor([r.sequence_id == 4 for r in plan.local_responses])
    plan = plan.with_masked(dropped_N)
    actions = sum(b.n_actions for b in plan.batches)
    old_A, _ = SCORER(tiny.role(base), plan.batches)
    streams = torch.randn(2, actions, generator=noise)
    return SimpleNamespace(
        plan=plan,
        moved=moved,
        old_A=old_A,
        rollout_A=torch.tensor([x for r in plan.local_responses for x in r.logprobs]),
        ref_A=old_A + 0.2 * streams[0],
        advantage_A=streams[1],
        function_N=torch.tensor([[0.0, 1.0, torch.nan, 0.5][r.sequence_id % 4] for r in plan.local_responses]),
        total_N=torch.tensor([[2.0, 1.0, 1.5, -1.0][r.sequence_id % 4] for r in plan.local_responses]),
        dropped_N=dropped_N,
        actor=tiny.role(moved, learns=tiny.ppo_config("unused").optimizer),
    )


def as_experience(config, scored, cluster):
    zeros = torch.zeros_like(scored.old_A)
    moments = Moments(*(torch.tensor(x, dtype=torch.float64) for x in (1.0, 0.0, 1.0)))
    shaped = ShapedGAE(scored.advantage_A, zeros, zeros, torch.zeros(len(scored.dropped_N)), moments)
    positive_N = right_responses(config, scored.function_N, scored.total_N)
    weights = loss_weights(config, scored.plan, scored.old_A, scored.rollout_A, positive_N, cluster)
    return Experience(
        scored.plan, None, scored.old_A, None, scored.ref_A, zeros, shaped, moments, scored.rollout_A, weights
    )


def surrogate(config, logp, old, rollout, response_terms, advantage):
    """The loss of one token. response_terms: (log p, old, rollout) of all tokens of its response, for its ratios."""
    if config.correction == "dis":
        if config.correction_level == "token":
            r = torch.exp(logp - rollout)
        else:
            mean = sum(x.item() - q for x, _, q in response_terms) / len(response_terms)
            r = math.exp(mean) * torch.exp(logp - logp.detach())  # the response's ratio, the token's gradient
        inside = 1 - config.dis_low <= r.item() <= 1 + config.dis_high
        return -r * advantage if inside else 0.0 * logp
    ratio = torch.exp(logp - old)
    clipped = torch.clamp(ratio, 1 - config.clip_low, 1 + config.clip_high)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
    if config.correction == "tis":
        log_weight = old - rollout
        if config.correction_level == "sequence":
            log_weight = sum(o - q for _, o, q in response_terms)
        loss = loss * min(math.exp(log_weight), config.tis_cap)
    return loss


def oracle(config, scored, number):
    """Loss and gradients of a minibatch, token by token."""
    plan, weights = scored.plan, tiny.doubles(scored.moved)
    bounds = torch.cat(
        [torch.zeros(1, dtype=torch.int64), torch.tensor([b.n_sequences for b in plan.batches]).cumsum(0)]
    )
    members = [n for i in plan.minibatches[number] for n in range(int(bounds[i]), int(bounds[i + 1]))]
    old, rollout, ref, advantage = (
        x.double().split(plan.cu_actions.diff().tolist())
        for x in (scored.old_A, scored.rollout_A, scored.ref_A, scored.advantage_A)
    )
    sums, lengths, nll, right_tokens = [], [], 0.0, 0
    for n in members:
        if scored.dropped_N[n]:
            continue
        terms = token_terms(weights, scored.moved.config, plan.local_responses[n], 1.0)
        triples = [(logp, o.item(), q.item()) for (logp, _), o, q in zip(terms, old[n], rollout[n], strict=True)]
        total = 0.0
        for t, (logp, entropy) in enumerate(terms):
            loss = surrogate(config, *triples[t], triples, advantage[n][t].item())
            if config.kl_in == "loss":
                d = logp.item() - ref[n][t].item()
                loss = loss + config.kl_coef * (d + d * (logp - logp.detach()))  # k1, with the gradient of k2
            extra = -config.entropy_coef * entropy
            if config.correction == "tis":  # the weight is that of the token's whole loss
                log_weight = triples[t][1] - triples[t][2]
                extra = extra * min(math.exp(log_weight), config.tis_cap)
            total = total + loss + extra
            score = {"function": scored.function_N, "total": scored.total_N}[config.positive_nll_score][n]
            if config.positive_nll_coef and score >= config.positive_nll_threshold:
                nll, right_tokens = nll - logp, right_tokens + 1
        sums.append(total)
        lengths.append(len(terms))
    if config.loss_aggregation == "token":
        loss = sum(sums) / sum(lengths)
    elif config.loss_aggregation == "sequence":
        loss = sum(s / length for s, length in zip(sums, lengths, strict=True)) / len(sums)
    else:
        loss = sum(sums) / (config.loss_constant or config.sampling.max_new_tokens) / len(sums)
    policy = loss.item()
    if right_tokens:
        loss = loss + config.positive_nll_coef * nll / right_tokens
    loss.backward()
    return policy, (nll / right_tokens).item() if right_tokens else None, {n: w.grad for n, w in weights.items()}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_of_each_minibatch_are_those_of_the_formula(case, scored, cluster):
    config = tiny.ppo_config("unused", **CASES[case])
    updater = Updater(config, scored.actor, scored.actor, SCORER, cluster)
    experience = as_experience(config, scored, cluster)
    for number, members in enumerate(scored.plan.minibatches):
        policy, nll, exact = oracle(config, scored, number)
        work = updater.policy_work(experience, members, config.kl_coef, may_clip=True)
        assert len(work) > 1
        total, worst = tiny.gap(tiny.gradients(scored.actor, work), exact)
        assert total <= 1e-5 and worst <= 1e-4
        outputs, _ = scored.actor.accumulate(work)
        (stats,) = merge_by_type(outputs).values()
        assert isinstance(stats, PolicyStats)
        assert float(stats.loss_sum / stats.count) == pytest.approx(policy, abs=1e-5)
        if config.positive_nll_coef:
            assert isinstance(stats, PolicyNLLStats)
            assert float(stats.nll_sum / stats.nll_tokens) == pytest.approx(nll, abs=1e-5)


def test_the_cases_cap_and_mask_what_they_are_about(scored, cluster):
    """A correction that leaves every token alone would agree with any rule."""
    for case in ("tis of tokens", "tis of responses"):
        weights = as_experience(tiny.ppo_config("unused", **CASES[case]), scored, cluster).weights
        capped = (weights.ratio_A > weights.truncated_A)[scored.plan.mask_A]
        assert 0.1 < capped.float().mean() < 0.9
    for case in ("dis of tokens", "dis of responses"):
        config = tiny.ppo_config("unused", **CASES[case])
        updater = Updater(config, scored.actor, scored.actor, SCORER, cluster)
        experience = as_experience(config, scored, cluster)
        outputs, _ = scored.actor.accumulate(updater.policy_work(experience, range(len(scored.plan.batches)), 0.0))
        (stats,) = merge_by_type(outputs).values()
        assert 0.05 < float(stats.clipped_sum / stats.count) < 0.95


# -- the parts, over drawn lengths, masks and ratios -------------------------------------------------------------------

LOGPROB = st.floats(-6, 0)
RESPONSES = st.lists(
    st.lists(st.tuples(LOGPROB, LOGPROB, st.booleans()), min_size=0, max_size=6), min_size=1, max_size=6
)


def drawn_plan(rows, minibatches=1):
    """A plan with a micro-batch for every two responses of drawn (old, rollout, counts), masks as drawn."""
    responses = [Response(n, 0, n, [5], [7] * len(row), [q for _, q, _ in row], "stop") for n, row in enumerate(rows)]
    pairs = [list(range(start, min(start + 2, len(rows)))) for start in range(0, len(rows), 2)]
    batches = [
        pack(
            [responses[n].prompt for n in pair],
            [responses[n].tokens for n in pair],
            action_masks=[[counts for *_, counts in rows[n]] for n in pair],
        )
        for pair in pairs
    ]
    steps = [list(range(len(batches)))[number::minibatches] for number in range(minibatches)]
    return BatchPlan(responses, [list(range(len(rows)))], 0, batches, steps)


def columns(rows):
    return (torch.tensor([x[i] for row in rows for x in row], dtype=torch.float32) for i in range(2))


@given(rows=RESPONSES, level=st.sampled_from(["token", "sequence"]), cap=st.sampled_from([0.5, 1.0, 2.0]))
def test_weights_of_tis_are_the_capped_ratios(rows, level, cap):
    config = tiny.ppo_config("unused", correction="tis", correction_level=level, tis_cap=cap)
    ratio_A = behaviour_ratio(config, drawn_plan(rows), *columns(rows))
    weight_A = truncated_weight(config, ratio_A)
    expected = []
    for row in rows:
        product = math.prod(math.exp(old - q) for old, q, counts in row if counts)
        expected += [math.exp(old - q) if level == "token" else product for old, q, _ in row]
    assert ratio_A.tolist() == pytest.approx([min(x, math.exp(20)) for x in expected], rel=1e-4)
    assert weight_A.tolist() == pytest.approx([min(x, cap) for x in expected], rel=1e-4)


@given(rows=RESPONSES)
def test_the_anchor_gives_every_token_the_geometric_mean_of_its_response(rows):
    new_A, rollout_A = columns(rows)
    plan = drawn_plan(rows)
    starts = torch.tensor([b.n_actions for b in plan.batches]).tolist()
    anchors = [
        anchor_of_sequence_ratio(new, rollout, batch)
        for new, rollout, batch in zip(new_A.split(starts), rollout_A.split(starts), plan.batches, strict=True)
    ]
    ratios = (new_A - torch.cat(anchors)).exp().tolist()
    expected = []
    for row in rows:
        counted = [math.exp(new - q) for new, q, counts in row if counts]
        expected += [math.prod(counted) ** (1 / max(len(counted), 1))] * len(row)
    assert ratios == pytest.approx(expected, rel=1e-4)


@given(
    rows=RESPONSES,
    kind=st.sampled_from(["sequence", "constant"]),
    constant=st.sampled_from([0, 3]),
    minibatches=st.integers(1, 3),
    right=st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_weights_of_an_aggregation_turn_a_token_mean_into_it(rows, kind, constant, minibatches, right):
    config = tiny.ppo_config("unused", loss_aggregation=kind, loss_constant=constant, positive_nll_coef=0.1)
    plan, (loss_A, _) = drawn_plan(rows, minibatches), columns(rows)
    weights = loss_weights(config, plan, loss_A, None, torch.tensor(right[: len(rows)]), ALONE)
    bounds = torch.tensor([b.n_actions for b in plan.batches]).tolist()
    parts = list(zip(loss_A.split(bounds), weights.weight_A.split(bounds), weights.positive, strict=True))
    for members in plan.minibatches:
        numbers = [n for i in members for n in (2 * i, 2 * i + 1) if n < len(rows)]
        counted = [[x for x, _, counts in rows[n] if counts] for n in numbers]
        actions = sum(map(len, counted))
        if not actions:
            continue
        means = [sum(row) / (len(row) if kind == "sequence" else constant or 8) for row in counted if row]
        found = sum(
            float((loss * weight)[plan.batches[i].counted_index].sum())
            for i in members
            for loss, weight, _ in [parts[i]]
        )
        assert found / actions == pytest.approx(sum(means) / len(means), rel=1e-4, abs=1e-5)
        taught = [x for n, row in zip(numbers, counted, strict=True) for x in row if right[n]]
        summed = sum(
            float(loss[rows_P.index_P].sum()) * rows_P.scale for i in members for loss, _, rows_P in [parts[i]]
        )
        assert summed / actions == pytest.approx(sum(taught) / len(taught) if taught else 0.0, rel=1e-4, abs=1e-5)


@given(weights=st.lists(st.floats(0.01, 2), min_size=1, max_size=9))
def test_the_effective_share_is_kishs(weights):
    mean = sum(weights) / len(weights)
    variance = sum((w - mean) ** 2 for w in weights) / len(weights)
    expected = sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights))
    assert effective_share(mean, variance) == pytest.approx(expected)


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=9),
    limit=st.integers(1, 20),
    share=st.floats(0.01, 1),
    factor=st.sampled_from([0.0, 1.0, 0.3]),
)
@settings(max_examples=50)
def test_the_overlong_penalty_is_that_of_dapo(lengths, limit, share, factor):
    buffer, lengths = max(1, int(share * limit)), [min(n, limit) for n in lengths]
    config = tiny.ppo_config("unused", max_new_tokens=limit, overlong_buffer=buffer, overlong_factor=factor)
    expected = []
    for length in lengths:
        if length <= limit - buffer:
            reward = 0.0
        else:
            reward = ((limit - buffer) - length) / buffer
        expected.append(-factor * reward)
    assert overlong_penalty(config, torch.tensor(lengths)).tolist() == pytest.approx(expected, rel=1e-6)
