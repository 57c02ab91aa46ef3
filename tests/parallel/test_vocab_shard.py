"""Vocabulary shards on gloo ranks: every operation agrees with one rank, to the bit across ranks, uneven and padded."""

import gc
import importlib.util
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from icegrt.kernels import (
    VocabShard,
    linear_logprobs,
    linear_ppo_loss,
    masked_moments,
    ppo_policy_loss,
    record_launches,
    sample_tokens,
    token_logprobs,
    use_backend,
    value_loss,
)
from tests.helpers.sampling_cases import ROWS as ROW_SETTINGS
from tests.helpers.sampling_cases import bitmask, by_row, drawn_ids

VOCAB, PADDED, ROWS, WIDTH = 37, 44, 23, 6
# Slices of the padded vocabulary; the last rank of three holds padding only.
CUTS = {2: [0, 16, 44], 3: [0, 5, 38, 44]}


def data():
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=generator)
    weight = torch.randn(PADDED, WIDTH, dtype=torch.float64, generator=generator) * 2
    labels = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    labels[4] = -100
    return hidden, weight, labels, torch.randn(ROWS, dtype=torch.float64, generator=generator)


def equal_on_all_ranks(x):
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    assert all(torch.equal(p, parts[0]) for p in parts)


def worker(rank, world, path):
    gc.freeze()  # what the parent holds stays unfreed here: its process groups' threads did not come along
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    start, stop = CUTS[world][rank : rank + 2]
    shard = VocabShard(dist.group.WORLD, start, stop - start, VOCAB)
    hidden, weight, labels, advantage = data()
    check_token_logprobs(hidden, weight, labels, shard, slice(start, stop))
    for backend in ("cpp", "chunked"):
        with use_backend(linear_logprobs=backend, linear_ppo_loss=backend):
            check_linear(hidden, weight, labels, advantage, shard, slice(start, stop))
            check_linear_exchange(hidden, weight, labels, advantage, shard, slice(start, stop))
            check_fp32_bits(hidden.float(), weight.float(), labels, shard, slice(start, stop))
            check_bad_linear_rows(shard, slice(start, stop))
    check_sampling(hidden, weight, shard, slice(start, stop))
    check_sampling_exchange(shard, slice(start, stop))
    if importlib.util.find_spec("triton") and not torch.cuda.is_available():
        check_triton_draws(shard, slice(start, stop))
        check_bad_rows(shard, slice(start, stop), "triton")
    check_bad_rows(shard, slice(start, stop), "reference")
    check_reductions(rank, world)
    dist.destroy_process_group()


def check_token_logprobs(hidden, weight, labels, shard, columns):
    logits = hidden @ weight.t()
    logits[2, :16] = -torch.inf  # a rank without a finite logit in this row
    labels = labels.clone()
    labels[2] = 30
    full_logits, local = logits[:, :VOCAB].clone().requires_grad_(), logits[:, columns].clone().requires_grad_()
    options = {"temperature": 0.7, "entropy": True}
    expected, out = (
        token_logprobs(full_logits, labels, **options),
        token_logprobs(local, labels, shard=shard, **options),
    )
    upstream = torch.linspace(-1, 1, ROWS, dtype=torch.float64)
    for a, b in ((out.logprob_A, expected.logprob_A), (out.entropy_A, expected.entropy_A)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        equal_on_all_ranks(a)
    for o in (expected, out):
        (o.logprob_A * upstream).sum().add((o.entropy_A * upstream.flip(0)).sum()).backward()
    full_grad = torch.zeros_like(logits)
    full_grad[:, :VOCAB] = full_logits.grad
    torch.testing.assert_close(local.grad, full_grad[:, columns], rtol=1e-9, atol=1e-11)


def check_linear(hidden, weight, labels, advantage, shard, columns):
    h1, w1 = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    h2, w2 = hidden.clone().requires_grad_(), weight[columns].clone().requires_grad_()
    padded = VocabShard(None, 0, PADDED, VOCAB)
    mask = torch.arange(ROWS) % 5 != 1
    options = {"mask_A": mask, "temperature": 0.8, "chunk_rows": 7}
    old = linear_logprobs(h1, w1, labels, shard=padded, **options).logprob_A.detach() + 0.3 * advantage.flip(0)
    objective = {
        "normalizer": 9.0,
        "entropy_coef": 0.1,
        "kl_coef": 0.2,
        "kl_estimator": "k3",
        "ref_logprob_A": old - 0.1,
    }
    plain = {**objective, "mask_A": mask & (labels != -100)}

    def composed(h, w, part):
        out = linear_logprobs(h, w, labels, entropy=True, shard=part, **options)
        return ppo_policy_loss(out.logprob_A, old, advantage, entropy_A=out.entropy_A, **plain).loss

    def fused(h, w, part):
        return linear_ppo_loss(h, w, labels, old, advantage, shard=part, **options, **objective).loss

    for loss in (composed, fused):
        a, b = loss(h1, w1, padded), loss(h2, w2, shard)
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        equal_on_all_ranks(b)
        (gh1, gw1), (gh2, gw2) = torch.autograd.grad(a, (h1, w1)), torch.autograd.grad(b, (h2, w2))
        torch.testing.assert_close(gh2, gh1, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(gw2, gw1[columns], rtol=1e-9, atol=1e-11)


def check_linear_exchange(hidden, weight, labels, advantage, shard, columns):
    """What travels in the loss, forward and backward: four numbers a row, once a chunk, and dX once."""
    hidden, weight = hidden.clone().requires_grad_(), weight[columns].clone().requires_grad_()
    gather, reduce, gathered_sizes, reduced = dist.all_gather, dist.all_reduce, [], []
    dist.all_gather = lambda parts, x, group: gathered_sizes.append(x.numel()) or gather(parts, x, group=group)
    dist.all_reduce = lambda x, group: reduced.append(tuple(x.shape)) or reduce(x, group=group)
    try:
        options = {"normalizer": 9.0, "chunk_rows": 7, "entropy_coef": 0.1}
        linear_ppo_loss(hidden, weight, labels, None, advantage, shard=shard, **options).loss.backward()
    finally:
        dist.all_gather, dist.all_reduce = gather, reduce
    assert gathered_sizes == [4 * 7, 4 * 7, 4 * 7, 4 * 2] and reduced == [(ROWS, WIDTH)], (gathered_sizes, reduced)


def check_fp32_bits(hidden, weight, labels, shard, columns):
    old = linear_logprobs(hidden, weight[columns], labels, shard=shard).logprob_A
    equal_on_all_ranks(old)
    truth = token_logprobs((hidden.double() @ weight.double().t())[:, :VOCAB], labels).logprob_A
    assert (old.double() - truth).abs().max() < 1e-5
    stats = linear_ppo_loss(hidden, weight[columns], labels, old, torch.ones(ROWS), normalizer=1.0, shard=shard).stats
    assert stats.ratio_min == 1 and stats.ratio_max == 1


def check_sampling(hidden, weight, shard, columns):
    logits = (hidden @ weight.t()).float()
    logits[:, VOCAB:] = 1e3  # padding must never be drawn
    logits[0] = 0.0
    logits[0, [3, 20]] = 50.0  # a tie across ranks goes to the lowest id
    random_state = {"seed": 11, "sequence_ids": torch.arange(ROWS), "positions": torch.arange(ROWS) * 3}
    mixed = by_row([ROW_SETTINGS[n % len(ROW_SETTINGS)] for n in range(ROWS)])
    allowed = bitmask(drawn_ids(ROWS, VOCAB, 0.4))
    for options in (
        {"temperature": 1.0},
        {"temperature": 0.0},
        {"temperature": 0.8, "top_k": 6, "top_p": 0.8},
        {"temperature": 0.8, "min_p": 0.2},
        {"temperature": 0.8, "allowed_NW": allowed},
        mixed,
        {**mixed, "allowed_NW": allowed},
    ):
        keys = random_state | options
        for backend in ("cpp", "reference"):
            with use_backend(sample_tokens=backend):
                expected = sample_tokens(logits[:, :VOCAB], **keys)
                out = (torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS))
                token, logprob = sample_tokens(logits[:, columns], shard=shard, out=out, **keys)
            assert token is out[0] and torch.equal(token, expected[0]), options
            torch.testing.assert_close(logprob, expected[1], rtol=1e-5, atol=1e-5)
            equal_on_all_ranks(token)
            equal_on_all_ranks(logprob)


def check_sampling_exchange(shard, columns):
    """Many rows, and what travels: numbers per row, never a slice of logits."""
    rows = 3000
    generator = torch.Generator().manual_seed(9)
    logits = torch.randn(rows, PADDED, generator=generator) * 2
    logits[:, 20] = logits[:, 3]  # equals on different ranks
    random_state = {"seed": 3, "sequence_ids": torch.arange(rows), "positions": torch.zeros(rows, dtype=torch.long)}
    plain, gather = [], dist.all_gather
    for options in ({}, {"offset": -1e4}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 7, "top_p": 0.9}):
        # Far from 0 too: a rank's own rounding of a quotient of -1e4 would move its candidate.
        rows_logits = logits + options.pop("offset", 0.0)
        expected, logprob = sample_tokens(rows_logits[:, :VOCAB], temperature=0.9, **random_state, **options)
        gathered_sizes = []

        def counted(parts, x, group, gathered_sizes=gathered_sizes):
            gathered_sizes.append(x.numel())
            return gather(parts, x, group=group)

        dist.all_gather = counted
        try:
            token, local_logprob = sample_tokens(
                rows_logits[:, columns], temperature=0.9, shard=shard, **random_state, **options
            )
        finally:
            dist.all_gather = gather
        assert torch.equal(token, expected), options
        torch.testing.assert_close(local_logprob, logprob, rtol=1e-5, atol=1e-5)
        assert max(gathered_sizes) <= 4 * rows and sum(gathered_sizes) <= (4 + 80 * len(options)) * rows, (
            options,
            gathered_sizes,
        )
        plain.append(len(gathered_sizes))
    assert plain[0] == 1


def check_triton_draws(shard, columns):
    """The same tokens from the kernel, under the interpreter."""
    logits = torch.randn(6, PADDED, generator=torch.Generator().manual_seed(4)) * 2
    logits[:, VOCAB:] = 1e3
    random_state = {"seed": 3, "sequence_ids": torch.arange(6), "positions": torch.arange(6)}
    mixed = by_row(ROW_SETTINGS[:6]) | {"allowed_NW": bitmask(drawn_ids(6, VOCAB, 0.4))}
    truncated = {"temperature": 0.7, "top_k": 5, "top_p": 0.8}
    for options in ({"temperature": 0.7}, {"temperature": 0.0}, truncated, mixed):
        keys = random_state | options
        expected, logprob = sample_tokens(logits[:, :VOCAB], **keys)
        with use_backend(sample_tokens="triton"), record_launches() as launches:
            token, local_logprob = sample_tokens(logits[:, columns], shard=shard, **keys)
        assert launches == [("sample_tokens_kernel", "triton")]
        assert torch.equal(token, expected), options
        torch.testing.assert_close(local_logprob, logprob, rtol=1e-5, atol=1e-5)
        equal_on_all_ranks(local_logprob)


def check_bad_rows(shard, columns, backend):
    """NaN and -inf in a column of one rank alone give on every rank what they give without a shard."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.tensor([0, 30, 2, 30, 3])
    weight = torch.randn(PADDED, 5, generator=generator)
    weight[20, 1], weight[:, 2], weight[30, 3] = math.nan, -math.inf, -math.inf
    expected = token_logprobs(weight[:VOCAB].t(), labels, temperature=0.7, entropy=True)
    assert expected.logprob_A.isnan().tolist() == [False, True, False, False, False]
    assert expected.logprob_A[2:4].tolist() == [-math.inf, -math.inf]
    logits = weight[columns].t().clone().requires_grad_()
    with use_backend(backend):
        out = token_logprobs(logits, labels, temperature=0.7, entropy=True, shard=shard)
    (out.logprob_A[[0, 1, 3, 4]].sum() + out.entropy_A.sum()).backward()
    for x, whole in zip((out.logprob_A, out.entropy_A), (expected.logprob_A, expected.entropy_A), strict=True):
        torch.testing.assert_close(x, whole, rtol=1e-5, atol=1e-5, equal_nan=True)
        equal_on_all_ranks(x.nan_to_num(nan=123.0))
    grad = logits.grad[:, : shard.valid]
    assert grad[1].isnan().all() and grad[[0, 2, 3, 4]].isfinite().all() and (grad[2] == 0).all()


def check_bad_linear_rows(shard, columns):
    """The same of the linear operations; a row of the identity is a column of the weight."""
    generator = torch.Generator().manual_seed(2)
    labels, hidden = torch.tensor([0, 30, 2, 3]), torch.eye(4)
    weight = torch.randn(PADDED, 4, generator=generator)
    weight[20, 1] = math.nan
    for rows in ([0, 2, 3], [0, 1, 2, 3]):  # a product with 0 spreads NaN over the rows
        leaf = hidden[rows].requires_grad_()
        used = weight if 1 in rows else weight.nan_to_num(nan=0.0)
        out = linear_logprobs(leaf, used[columns], labels[rows], temperature=0.7, entropy=True, shard=shard)
        (out.logprob_A.sum() + out.entropy_A.sum()).backward()
        for x in (out.logprob_A, out.entropy_A, leaf.grad):
            assert x.isnan().all() if 1 in rows else x.isfinite().all()
            equal_on_all_ranks(x.nan_to_num(nan=123.0))


def check_reductions(rank, world):
    x = torch.randn(40, generator=torch.Generator().manual_seed(1)) + 100
    local = x[: 40 - world + 1] if rank == 0 else x[:0] if rank == 1 else x[40 - world + 1 :]
    remainder = x[40 - world + 1 :] if world == 2 else x[:0]
    if rank == 0:
        local = torch.cat([local, remainder])
    moments = masked_moments(local, group=dist.group.WORLD)  # rank 1 has nothing and joins all the same
    torch.testing.assert_close(moments.variance, x.double().var(correction=0))
    for part in (moments.count, moments.mean, moments.m2):
        equal_on_all_ranks(part)
    zeros = torch.zeros(rank)
    stats = ppo_policy_loss(zeros - rank, zeros, zeros + 1, normalizer=1.0).stats.reduce()
    assert stats.count == sum(range(world)) and stats.logprob_diff_abs_max == world - 1
    assert stats.ratio_max.item() == pytest.approx(math.exp(-1)), stats.ratio_max
    assert stats.ratio_min.item() == pytest.approx(math.exp(1 - world)), stats.ratio_min
    # Squared deviations about each rank's mean become those about the common mean; rank 0 has no token.
    deviation = torch.linspace(-1e-3, 1e-3, 40, dtype=torch.float64)
    per_rank = 40 // (world - 1)
    returns = 1e6 + deviation[(rank - 1) * per_rank : rank * per_rank] if rank else deviation[:0]
    values = 1e6 + 0.5 * (returns - 1e6)
    stats = value_loss(values, None, returns, clip=None, normalizer=1.0).stats.reduce()
    assert stats.count == 40 and stats.explained_variance.item() == pytest.approx(0.75, abs=1e-6)


@pytest.mark.parametrize("world", [2, 3])
def test_shards_agree_with_one_rank(world, tmp_path):
    mp.start_processes(worker, args=(world, tmp_path / "store"), nprocs=world, start_method="fork")
