"""The operations that the end-to-end bench counts, against its formula and against sums by hand."""

import pytest
import torch
from torch.nn import functional as F

from bench.end_to_end.figures import counted, details, rows_of, shares_of_peak
from bench.end_to_end.flops import ATTENTION, PRODUCTS, PhaseFlops, attended_pairs, useful_flops
from bench.end_to_end.icegrt_worker import Iterations, attended_tokens, count_compiled
from bench.end_to_end.providers import Provider
from bench.end_to_end.recipe import ppo_config
from bench.end_to_end.workloads import PAD, workload_of
from bench.reference_ppo.padding import Episode, padded_batches, padding_fraction
from bench.reference_ppo.trainer import ReferencePPO, reward_model_score
from icegrt.kernels import packed_attention

SIZES = "layers=2,width=32,mlp=48,heads=4,kv_heads=2,vocab=64,prompts=3,samples=2,prompt_tokens=3:12,answer_tokens=6"
SMALL = workload_of(f"uniform,{SIZES}")
# The LM head is the embedding, and there are three times as many heads as of keys.
TIED = workload_of("135M,layers=2,width=36,mlp=40,vocab=64,prompts=3,prompt_tokens=3:12,answer_tokens=4")


def scalar_heads(workload, rows):
    """Operations of a head with one output on so many rows."""
    return 2 * workload.width * rows


@pytest.mark.parametrize("workload", [SMALL, TIED], ids=["uniform", "135M"])
def test_icegrt_executes_the_formula_and_its_scalar_heads(tmp_path, workload):
    with Iterations(workload, "fp32", [], tmp_path, tmp_path / "run") as iterations:
        figures = iterations.count()
    tokens, answers, flops = figures["tokens"], figures["answer_tokens"], figures["flops"]
    assert figures["padding"] == 0
    assert flops["rollout"][PRODUCTS] == useful_flops(workload, "rollout", tokens, answers)
    # Values of all answer tokens and of each episode's end, and a score of each episode.
    scored = scalar_heads(workload, answers + 2 * workload.episodes)
    assert flops["score"][PRODUCTS] == useful_flops(workload, "score", tokens, answers) + scored
    trained = 3 * scalar_heads(workload, answers)
    assert flops["update"][PRODUCTS] == useful_flops(workload, "update", tokens, answers) + trained
    assert all(flops[phase][ATTENTION] > 0 for phase in flops)
    assert set(figures["busy_phases"]) == {"rollout", "score", "update"}


def test_a_critic_that_learns_before_the_advantages_counts_as_update(tmp_path):
    keys = ["ppo.reuse_update_logprob=true", "ppo.kl_logprobs=rollout", "ppo.reuse_update_values=true"]
    with Iterations(SMALL, "fp32", keys, tmp_path, tmp_path / "run") as iterations:
        figures = iterations.count()
    tokens, answers, flops = figures["tokens"], figures["answer_tokens"], figures["flops"]
    # Inference has the reference and the reward model alone: half of its trunks and heads.
    inferred = useful_flops(SMALL, "score", tokens, answers) // 2 + scalar_heads(SMALL, SMALL.episodes)
    assert flops["score"][PRODUCTS] == inferred
    trained = useful_flops(SMALL, "update", tokens, answers) + 3 * scalar_heads(SMALL, answers)
    assert trained <= flops["update"][PRODUCTS] <= trained + 3 * scalar_heads(SMALL, SMALL.episodes)
    assert set(figures["busy_phases"]) == set(flops) == {"rollout", "score", "update"}


@pytest.mark.parametrize("workload", [SMALL, TIED], ids=["uniform", "135M"])
def test_the_reference_path_executes_its_padding_and_a_head_at_every_position(workload):
    rows = 3
    actor, critic = workload.actor(), workload.reward_model()
    score = reward_model_score(critic, rows, PAD)
    path = ReferencePPO(
        ppo_config(workload, "unused"), actor, actor, critic, score, pad_id=PAD, eos_ids=workload.stop_ids, rows=rows
    )
    torch.manual_seed(0)
    with PhaseFlops() as counter:
        path.on_phase_end = counter.end_phase
        episodes = path.step(workload.prompt_ids()).episodes
    batches = padded_batches(episodes, range(len(episodes)), rows, PAD)
    positions = sum(batch.tokens_NL.numel() for batch in batches)
    assert path.padding_fraction == padding_fraction(batches) > 0
    # Values at all positions but the last of each row, and scores of the episodes.
    scalar = scalar_heads(workload, positions)
    assert counter.phases["score"][PRODUCTS] == useful_flops(workload, "score", positions, positions) + scalar
    assert counter.phases["shape"] == {PRODUCTS: 0, ATTENTION: 0}


def test_padding_is_a_share_of_all_positions():
    episodes = [Episode([5] * 2, [6] * 2), Episode([5] * 3, [6] * 5), Episode([5], [6])]
    assert padding_fraction(padded_batches(episodes, range(3), 2, PAD)) == pytest.approx(4 / 18)
    assert padding_fraction(padded_batches(episodes, range(3), 1, PAD)) == 0


@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention_of_cpus_is_counted(causal):
    q, k, v = (torch.randn(2, 3, length, 8, requires_grad=True) for length in ((5, 5, 5) if causal else (5, 7, 7)))
    with PhaseFlops() as counter:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        counter.end_phase("forward")
        out.sum().backward()
        counter.end_phase("backward")
    pairs = 15 if causal else 35
    assert counter.phases["forward"] == {PRODUCTS: 0, ATTENTION: 2 * 2 * 3 * pairs * 16}
    assert counter.phases["backward"] == {PRODUCTS: 0, ATTENTION: 2 * 2 * 3 * pairs * 40}


def test_packed_attention_in_cpp_is_counted():
    q, k, v = (torch.randn(rows, 4, 8, requires_grad=True) for rows in (6, 8, 8))
    with PhaseFlops() as counter, count_compiled(counter):
        out = packed_attention(q, k, v, [4, 2], key_lengths=[4, 4])
        counter.end_phase("forward")
        out.sum().backward()
        counter.end_phase("backward")
    pairs = 10 + 7
    assert counter.phases["forward"] == {PRODUCTS: 0, ATTENTION: 2 * 2 * 4 * 8 * pairs}
    assert counter.phases["backward"] == {PRODUCTS: 0, ATTENTION: 2 * 5 * 4 * 8 * pairs}


def test_products_that_add_to_their_output_are_counted():
    a, b, out = torch.ones(2, 3), torch.ones(3, 5), torch.zeros(2, 5)
    with PhaseFlops() as counter:
        out.addmm_(a, b)
        torch.addmm(out, a, b)
        torch.mm(a, b, out=out)
        counter.add(PRODUCTS, 7)
        counter.end_phase("work")
    assert counter.phases == {"work": {PRODUCTS: 3 * 60 + 7, ATTENTION: 0}}


def test_causal_pairs():
    for queries, keys in ((1, 1), (4, 4), (2, 5), (5, 2)):
        mask = torch.ones(queries, keys, dtype=torch.bool).tril()
        assert attended_pairs(queries, keys, True) == mask.sum()
        assert attended_pairs(queries, keys, False) == mask.numel()


def test_rows_of_paged_attention_read_what_came_before_them():
    lengths, starts = torch.tensor([5, 0, 3], dtype=torch.int32), torch.tensor([0, 3, 3, 4], dtype=torch.int32)
    assert attended_tokens(lengths, starts) == (3 + 4 + 5) + 3
    assert attended_tokens(lengths, None) == 8


def figures_of(tokens, seconds):
    return {
        "seconds": 4 * seconds,
        "cpu_seconds": 5.0,
        "peak_bytes": 10,
        "tokens": tokens,
        "answer_tokens": 30,
        "phases": {"rollout": seconds, "score": seconds, "shape": 0.1, "update": 2 * seconds},
    }


COUNTS = {
    "tokens": 100,
    "answer_tokens": 40,
    "padding": 0.25,
    "flops": {phase: {PRODUCTS: 10**9, ATTENTION: 10**6} for phase in ("rollout", "score", "shape", "update")},
}


def test_shares_of_the_peak_follow_the_tokens():
    shares = shares_of_peak([figures_of(100, 1.0), figures_of(200, 1.0)], COUNTS, peak=4.0)
    assert shares == {"rollout": [0.25, 0.5], "score": [0.25, 0.5], "update": [0.125, 0.25]}
    assert shares_of_peak([figures_of(100, 1.0)], {}, peak=4.0) == {}


def test_rows_have_operations_padding_and_ranks(monkeypatch):
    monkeypatch.setattr("bench.end_to_end.figures.versions", lambda python, threads: "{}")
    options = type("Options", (), {"threads": 2})
    runs = [figures_of(100, 1.0) | {"slowest_over_fastest": {"update": 1.5}}]
    provider = Provider("icegrt, 2 ranks", "icegrt ranks", "python", "module", (), 2)
    rows = {r["metric"]: r for r in rows_of(SMALL, "fp32", provider, runs, 4.0, options, COUNTS)}
    assert rows["time"]["median"] == 4.0 and rows["time of update"]["median"] == 2.0
    assert rows["answer tokens per second"]["median"] == 30 / 4
    assert rows["slowest / fastest rank, update"]["median"] == 1.5
    assert rows["executed operations, score"]["median"] == 10**9
    assert rows["executed operations of attention, score"]["median"] == 10**6
    assert rows["useful operations, score"]["median"] == useful_flops(SMALL, "score", 100, 40)
    assert rows["padding"]["median"] == 0.25 and "executed operations, shape" not in rows
    assert {r["case"] for r in rows.values()} == {f"{SMALL.name} fp32"}
    lines = details(SMALL, runs, COUNTS, 4.0)
    assert "share of the matrix-product peak: rollout 0.25, score 0.25, update 0.12" in lines
    assert lines[1].endswith("; padding 25.0%") and lines[2] == "slowest / fastest rank: update 1.50"


def test_a_rollout_alone_is_no_iteration(monkeypatch):
    monkeypatch.setattr("bench.end_to_end.figures.versions", lambda python, threads: "{}")
    options = type("Options", (), {"threads": 2})
    provider = Provider("peer", "peer", "python", "module", (), is_rollout_only=True)
    runs = [figures_of(100, 1.0) | {"phases": {"rollout": 3.0}}]
    metrics = {r["metric"] for r in rows_of(SMALL, "fp32", provider, runs, 4.0, options)}
    assert metrics == {"processor time of rollout", "time of rollout", "answer tokens per second"}
    assert counted(SMALL, {}) == {}
