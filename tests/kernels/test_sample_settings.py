"""sample_tokens with settings by row, min_p, allowed ids and static buffers, on CPUs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icegrt.kernels import VocabShard, record_launches, sample_tokens, use_backend
from tests.helpers.dispatch_records import Recorded
from tests.helpers.sampling_cases import DTYPES, ROWS, bitmask, by_row, drawn_ids, exact_draw

BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpp"])
N, V = len(ROWS), 77


def draw(backend, logits, ids=None, **options):
    ids = torch.arange(logits.shape[0]) if ids is None else ids
    options = {"temperature": 1.0, "seed": 0} | options
    with use_backend(backend):
        return sample_tokens(logits, sequence_ids=ids, positions=ids * 3, **options)


def logits_of(rows=N, columns=V, spread=2.0, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * spread


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_row_is_the_same_as_numbers_in_tensors_alone_and_in_a_batch(backend, dtype):
    logits, allowed = logits_of().to(dtype), bitmask(drawn_ids(N, V, 0.7))
    for mask in (None, allowed):
        token, logprob = draw(backend, logits, **by_row(ROWS), allowed_NW=mask)
        for n, row in enumerate(ROWS):
            own = {"ids": torch.tensor([n]), "allowed_NW": None if mask is None else mask[n : n + 1]}
            for one in (row, by_row([row]), row | by_row([row], ("top_k", "seed"))):
                alone = draw(backend, logits[n : n + 1], **own, **one)
                assert alone[0] == token[n] and alone[1] == logprob[n], (n, one)


@BACKENDS
@pytest.mark.parametrize("seed", range(6))
def test_draws_are_those_of_fp64(backend, seed):
    """The tokens, and log-probs under the truncated distribution, against a sort in Python."""
    logits, allowed = logits_of(seed=seed), drawn_ids(N, V, 0.6, seed)
    logits[:, 40:44] = logits[:, 3:4]  # equals: the lowest ids stay
    for mask in (None, allowed):
        token, logprob = draw(backend, logits, **by_row(ROWS), allowed_NW=None if mask is None else bitmask(mask))
        for n, row in enumerate(ROWS):
            exact = exact_draw(logits[n], row, n, 3 * n, None if mask is None else mask[n])
            if exact.lead > 1e-5 and exact.slack > 1e-5:
                assert token[n] == exact.token and abs(logprob[n] - exact.logprob) < 2e-6, (n, row)


@given(
    columns=st.integers(1, 700),
    temperature=st.sampled_from([0.0, 0.25, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 3, 60, 5000]),
    top_p=st.sampled_from([1.0, 0.375, 0.9375, 2.0**-20]),
    min_p=st.sampled_from([0.0, 2.0**-30, 0.03125, 0.5, 1.0]),
    share=st.sampled_from([None, 0.02, 0.5, 1.0]),
    spread=st.sampled_from([0.0, 0.1, 3.0, 50.0]),
    seed=st.integers(-(1 << 70), 1 << 70),
)
@settings(max_examples=60, deadline=None)
def test_cpp_draws_what_the_reference_draws(columns, temperature, top_k, top_p, min_p, share, spread, seed):
    logits = logits_of(4, columns, spread, seed % 1000)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    options["allowed_NW"] = None if share is None else bitmask(drawn_ids(4, columns, share, seed % 999))
    (token, logprob), (plain, plain_logprob) = (draw(backend, logits, **options) for backend in ("cpp", "reference"))
    assert torch.equal(token, plain)
    torch.testing.assert_close(logprob, plain_logprob, rtol=2e-6, atol=2e-6)


@BACKENDS
def test_min_p_is_relative_to_the_largest(backend):
    """Probabilities 0.5, 0.25, 0.125, ...: a column at the limit stays, and all equals of the largest do."""
    rows = 2000
    logits = (-torch.arange(8) * torch.tensor(2.0, dtype=torch.float64).log()).expand(rows, 8)
    for min_p, survivors in ((1.0, 1), (0.3, 2), (0.25 - 1e-9, 3), (0.0, 8)):
        assert draw(backend, logits, min_p=min_p)[0].unique().tolist() == list(range(survivors))
    assert draw(backend, torch.zeros(rows, 5), min_p=1.0)[0].unique().tolist() == [0, 1, 2, 3, 4]
    # At temperature 2 the ratio of neighbours is the square root of a half.
    assert draw(backend, logits, temperature=2.0, min_p=0.6)[0].unique().tolist() == [0, 1]


@BACKENDS
def test_only_allowed_ids_are_drawn(backend):
    """Also by the arg-max; bits behind the vocabulary name no id; a shard of one rank has padding."""
    allowed = torch.zeros(600, 77, dtype=torch.bool)
    allowed[:, [0, 31, 32, 63, 76]] = True
    words = bitmask(allowed) | bitmask(torch.arange(96).expand(600, 96) >= 77)
    token, logprob = draw(backend, torch.zeros(600, 77), allowed_NW=words)
    assert token.unique().tolist() == [0, 31, 32, 63, 76]
    torch.testing.assert_close(logprob, torch.full((600,), 0.2).log())
    logits = torch.arange(77.0).expand(600, 77)
    assert draw(backend, logits[:, :75], temperature=0.0, allowed_NW=words)[0].unique().tolist() == [63]
    padded = torch.cat([logits, torch.full((600, 9), 1e3)], 1)
    shard = VocabShard(None, 0, 86, 77)
    assert draw(backend, padded, temperature=0.0, allowed_NW=words, shard=shard)[0].unique().tolist() == [76]


@BACKENDS
def test_nan_and_infinity(backend):
    """NaN that is not allowed is not seen; NaN that is allowed is the token; allowed ids of -inf give id 0."""
    logits = torch.zeros(5, 40)
    logits[0, 7] = logits[1, 7] = torch.nan
    logits[2, [5, 9]] = torch.inf
    logits[3] = -torch.inf
    logits[4, :39] = -torch.inf
    allowed = torch.ones(5, 40, dtype=torch.bool)
    allowed[1, 7] = False
    for temperature in (1.0, 0.0, torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])):
        for options in ({}, {"top_k": 3, "top_p": 0.5, "min_p": 0.25}):
            token, logprob = draw(backend, logits, temperature=temperature, allowed_NW=bitmask(allowed), **options)
            assert token[0] == 7 and token[1] != 7 and token[3] == 0 and token[4] == 39
            assert logprob.isnan().tolist()[:2] == [True, False] and logprob[3] == -torch.inf and logprob[4] == 0
            if not options:  # a sort of infinities leaves the masses undefined
                assert token[2] == 5 and logprob[2].isnan()


def test_static_buffers_take_the_results_without_an_allocation():
    logits, keys = logits_of(), by_row(ROWS)
    expected = draw("cpp", logits, **keys)
    for backend in ("cpp", "reference"):
        out = (torch.full((N,), -1), torch.full((N,), torch.nan))
        results = draw(backend, logits, **keys, out=out)
        assert results[0] is out[0] and results[1] is out[1]
        plain = draw(backend, logits, **keys)
        assert torch.equal(out[0], plain[0]) and torch.equal(out[1], plain[1])
    ids = torch.arange(N)
    with Recorded() as recorded, record_launches() as launches:
        sample_tokens(logits, temperature=1.0, seed=0, sequence_ids=ids, positions=ids, out=out)
    assert recorded.names == [] and launches == [("sample_tokens", "cpp")]
    assert not torch.equal(out[0], expected[0])


def test_threads_do_not_change_bits():
    logits = logits_of(300, 2000)
    rows = [ROWS[n % N] for n in range(300)]
    expected, threads = draw("cpp", logits, **by_row(rows)), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 3)
        token, logprob = draw("cpp", logits, **by_row(rows))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(token, expected[0]) and torch.equal(logprob, expected[1])


def test_nothing_is_read_on_the_host():
    """On the meta device a value that is read is an error."""
    keys = {name: x.to("meta") for name, x in by_row(ROWS).items()}
    ids = torch.arange(N, device="meta")
    allowed = torch.empty(N, 3, dtype=torch.int32, device="meta")
    token, logprob = sample_tokens(
        torch.empty(N, V, device="meta"), **keys, sequence_ids=ids, positions=ids, allowed_NW=allowed
    )
    assert token.shape == logprob.shape == (N,) and token.device.type == "meta"


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p"])
def test_values_out_of_range_are_refused_with_their_row(name):
    tensors = by_row(ROWS)
    for bad in (-1.0, torch.nan, 2.0) if name in ("top_p", "min_p") else (-1.0,):
        if DTYPES[name] != torch.int32 or bad == bad:
            wrong = tensors[name].clone()
            wrong[4] = bad
            with pytest.raises(ValueError, match=rf"sample_tokens: {name} must be finite and .* at row 4"):
                draw("cpp", logits_of(), **tensors | {name: wrong})


def test_errors_name_the_argument():
    logits, ids, allowed = logits_of(), torch.arange(N), bitmask(drawn_ids(N, V))
    none = allowed.clone()
    none[2] = 0
    none[2, 2] = 1 << 20  # behind the vocabulary of 77 ids
    token, logprob = torch.zeros(N, dtype=torch.int64), torch.zeros(N)
    for kind, message, options in (
        (
            TypeError,
            "temperature must be a number or a tensor of torch.float32",
            {"temperature": torch.ones(N).double()},
        ),
        (TypeError, "top_k must be a number or a tensor of torch.int32", {"top_k": ids}),
        (TypeError, "seed must be a number or a tensor of torch.int64", {"seed": ids.int()}),
        (ValueError, r"top_p must have shape \(9\)", {"top_p": torch.ones(3)}),
        (ValueError, "min_p must be finite and >= 0.0 and <= 1.0", {"min_p": 1.5}),
        (ValueError, "min_p must be on cpu", {"min_p": torch.ones(N, device="meta")}),
        (ValueError, r"allowed_NW must have shape \(9, 3\)", {"allowed_NW": allowed[:, :2]}),
        (TypeError, "allowed_NW must be int32", {"allowed_NW": allowed.long()}),
        (ValueError, "allowed_NW must allow an id in every row, got none at row 2", {"allowed_NW": none}),
        (TypeError, "out must be a tuple", {"out": token}),
        (TypeError, "token_N of out must be torch.int64", {"out": (token.int(), logprob)}),
        (TypeError, "logprob_N of out must be torch.float32", {"out": (token, logprob.double())}),
        (ValueError, "logprob_N of out must have shape", {"out": (token, logprob[:4])}),
        (
            ValueError,
            "token_N of out must be contiguous",
            {"out": (torch.zeros(2 * N, dtype=torch.int64)[::2], logprob)},
        ),
    ):
        with pytest.raises(kind, match=message):
            draw("cpp", logits, **options)
