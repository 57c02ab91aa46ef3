"""sample_tokens: the distribution is right, and nothing about the layout reaches the token."""

import pytest
import torch

from icegrt.kernels import VocabShard, sample_tokens, token_logprobs, use_backend
from icegrt.kernels.sample_tokens.reference import exponential_noise, row_keys
from tests.helpers.kernel_cases import near_ties


@pytest.fixture(params=["reference", "cpp"], autouse=True)
def _backend(request):
    with use_backend(sample_tokens=request.param):
        yield


def draw(logits, temperature=1.0, seed=0, ids=None, positions=None, **options):
    rows = logits.shape[0]
    ids = torch.arange(rows) if ids is None else ids
    positions = torch.zeros(rows, dtype=torch.long) if positions is None else positions
    return sample_tokens(logits, temperature=temperature, seed=seed, sequence_ids=ids, positions=positions, **options)


@pytest.mark.parametrize(("temperature", "options"), [(1.0, {}), (0.6, {}), (1.0, {"top_k": 4}), (1.0, {"top_p": 0.7})])
@pytest.mark.parametrize("axis", ["ids", "positions", "seed"])
def test_frequencies_follow_the_distribution(temperature, options, axis):
    n, V = 40_000, 9
    row = torch.randn(V, generator=torch.Generator().manual_seed(3))
    logits = row.expand(n, V)
    indices = torch.arange(n)
    if axis == "seed":
        draws = [draw(logits[:400], temperature, seed=s, **options) for s in range(100)]
        token, logprob = (torch.cat(x) for x in zip(*draws, strict=True))
    else:
        zeros = torch.zeros(n, dtype=torch.long)
        ids, positions = (indices, zeros) if axis == "ids" else (zeros, indices)
        token, logprob = draw(logits, temperature, ids=ids, positions=positions, **options)
    p = torch.softmax(row / temperature, -1)
    order = p.argsort(descending=True)
    survives = torch.zeros(V, dtype=torch.bool)
    count = options.get("top_k", V)
    if "top_p" in options:
        count = int((p[order].cumsum(0) < 0.7).sum()) + 1
    survives[order[:count]] = True
    p = torch.where(survives, p, 0) / p[survives].sum()
    frequencies = torch.bincount(token, minlength=V)
    assert (frequencies[~survives] == 0).all()
    chi_square = ((frequencies - token.numel() * p)[survives] ** 2 / (token.numel() * p[survives])).sum()
    assert chi_square < 30  # 8 degrees of freedom or fewer: p-value above 2e-4
    torch.testing.assert_close(logprob, p.log()[token], rtol=1e-5, atol=1e-5)


def test_noise_is_exponential_and_uncorrelated_over_neighbours():
    ids, positions = torch.arange(64).repeat_interleave(8), torch.arange(8).repeat(64)
    x = exponential_noise(row_keys(7, ids, positions), 0, 2000).double()
    assert x.min() >= 0 and torch.isfinite(x).all()
    assert abs(x.mean() - 1) < 5e-3 and abs(x.var() - 1) < 2e-2
    u = torch.sort((-x).exp().flatten()).values
    steps = torch.linspace(0, 1, u.numel(), dtype=torch.float64)
    assert (u - steps).abs().max() < 2e-3  # Kolmogorov-Smirnov at a million draws
    y = x - 1
    for lag in (1, 2, 8, 64):
        assert abs((y[:, lag:] * y[:, :-lag]).mean()) < 5e-3  # along the vocabulary
        assert abs((y[lag:] * y[:-lag]).mean()) < 5e-3  # along positions and sequences
    assert torch.unique(x.float()[:, 0]).numel() > 500


def test_token_does_not_depend_on_batch_order_or_size():
    torch.manual_seed(0)
    logits, ids, positions = torch.randn(50, 331), torch.randint(0, 1 << 40, (50,)), torch.randint(0, 4096, (50,))
    token, logprob = draw(logits, 0.8, ids=ids, positions=positions)
    order = torch.randperm(50)
    shuffled = draw(logits[order], 0.8, ids=ids[order], positions=positions[order])
    assert torch.equal(shuffled[0], token[order]) and torch.equal(shuffled[1], logprob[order])
    for i in range(0, 50, 7):
        alone = draw(logits[i : i + 1], 0.8, ids=ids[i : i + 1], positions=positions[i : i + 1])
        assert alone[0] == token[i] and alone[1] == logprob[i]
    strided = draw(torch.cat([logits, logits], 1).t().contiguous().t()[:, :331], 0.8, ids=ids, positions=positions)
    assert torch.equal(strided[0], token)
    assert torch.equal(draw(logits, 0.8, ids=ids.clone(), positions=positions.int())[0], token)


def test_seed_sequence_and_position_each_change_the_draw():
    logits = torch.zeros(1, 100_000)
    tokens = {
        draw(logits, seed=seed, ids=torch.tensor([i]), positions=torch.tensor([p]))[0].item()
        for seed, i, p in [
            (0, 0, 0),
            (1, 0, 0),
            (0, 1, 0),
            (0, 0, 1),
            (-1, 0, 0),
            (1 << 70, 5, 0),
            (0, 1, 1),
            (1, 1, 0),
        ]
    }
    assert len(tokens) == 8


def test_noise_of_a_slice_is_a_slice_of_the_noise():
    keys = row_keys(3, torch.arange(5), torch.arange(5))
    noise = exponential_noise(keys, 0, 1000)
    slices = [exponential_noise(keys, a, b - a) for a, b in ((0, 1), (1, 334), (334, 1000))]
    torch.testing.assert_close(torch.cat(slices, 1), noise, rtol=1e-6, atol=0)


def test_logprob_is_that_of_token_logprobs():
    logits = torch.randn(20, 1000).bfloat16()
    token, logprob = draw(logits, 0.7)
    torch.testing.assert_close(logprob, token_logprobs(logits, token, temperature=0.7).logprob_A)


def test_logits_far_from_zero_lose_no_digits():
    """The draw and its log-prob are those of fp64, also between candidates whose quotients fp32 would round."""
    logits, ids, expected = near_ties(1000, 1.7)
    for options in ({}, {"top_k": 2}, {"top_p": 0.9999}):
        token, logprob = draw(logits, 1.7, ids=ids, positions=torch.zeros_like(ids), **options)
        both = (logits.double() / 1.7).softmax(-1).amax(-1) < 0.9999  # neither candidate is truncated
        assert torch.equal(token[both], expected[both]) and both.sum() > 900
        truth = (logits.double() / 1.7).log_softmax(-1).gather(1, token[:, None]).squeeze(1)
        assert (logprob.double() - truth)[both].abs().max() < 2e-6


def test_a_row_with_nan_has_a_token_of_the_vocabulary(tmp_path):
    """A sharded vocabulary too: its ranks merge candidates, and NaN equals nothing."""
    logits = torch.zeros(2, 6)
    logits[0, 4] = torch.nan
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        shard = VocabShard(torch.distributed.group.WORLD, 0, 6, 6)
        for token, logprob in (draw(logits), draw(logits, shard=shard)):
            assert token[0] == 4 and logprob.isnan().tolist() == [True, False]
    finally:
        torch.distributed.destroy_process_group()


def test_greedy_ties_infinities_padding_and_empty_batches():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [-torch.inf, -torch.inf, 2.0, -torch.inf]])
    token, logprob = draw(logits, 0.0)
    assert token.tolist() == [1, 2]
    torch.testing.assert_close(logprob, logits.log_softmax(-1).gather(1, token[:, None]).squeeze(1))
    assert draw(logits[1:].expand(500, 4))[0].unique().tolist() == [2]
    padded = torch.zeros(300, 8)
    padded[:, 5:] = 100.0
    assert draw(padded, shard=VocabShard(None, 0, 8, 5))[0].max() == 4
    token, logprob = draw(torch.zeros(0, 4))
    assert token.shape == logprob.shape == (0,) and token.dtype == torch.int64
    assert draw(torch.zeros(3, 4))[1].dtype == torch.float32


def test_truncation_keeps_the_lowest_ids_of_equals():
    logits = torch.zeros(2000, 6)
    assert draw(logits, top_k=2)[0].unique().tolist() == [0, 1]
    assert draw(logits, top_p=0.4)[0].unique().tolist() == [0, 1, 2]
    assert draw(logits, top_k=1)[1].abs().max() == 0


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("temperature must be finite", {"temperature": -1.0}),
        ("top_p must be finite", {"top_p": 0.0}),
        ("top_k must be an int", {"top_k": -1}),
        ("sequence_ids must have shape", {"ids": torch.arange(3)}),
        ("seed must be an int", {"seed": 0.5}),
    ],
)
def test_errors_name_the_argument(match, change):
    with pytest.raises(ValueError, match=match):
        draw(torch.zeros(2, 3), **change)


def test_wrong_dtypes_and_devices_are_refused_by_name():
    with pytest.raises(TypeError, match="logits_NV must be floating point"):
        draw(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(TypeError, match="positions must be int32 or int64"):
        draw(torch.zeros(2, 3), positions=torch.zeros(2))
    with pytest.raises(ValueError, match=r"sequence_ids must be on cpu .* got meta"):
        draw(torch.zeros(2, 3), ids=torch.zeros(2, dtype=torch.long, device="meta"))


@pytest.mark.parametrize("options", [{"top_k": 7}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.7}], ids=str)
def test_truncation_by_threshold_search_keeps_what_sorting_keeps(options, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        logits = torch.randn(400, 50) * 2
        logits[:, 30] = logits[:, 4]  # equals
        logits[0] = 0.0
        shard = VocabShard(torch.distributed.group.WORLD, 0, 50, 50)
        searched, sorted_ = draw(logits, shard=shard, **options), draw(logits, **options)
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(searched[0], sorted_[0])
    torch.testing.assert_close(searched[1], sorted_[1], rtol=1e-5, atol=1e-5)
