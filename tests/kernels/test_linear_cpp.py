"""The C++ passes over logits: statistics and gradients of rows that hold anything, always with the same bits."""

from types import SimpleNamespace

import pytest
import torch

from icegrt.kernels import VocabShard, linear_logprobs, linear_ppo_loss, record_launches, use_backend
from icegrt.kernels.common import vocab_rows
from icegrt.kernels.common.vocab_rows import RowStats, TokenGrads
from icegrt.kernels.linear import cpp, torch_ops
from icegrt.kernels.linear.chunked import _active_rows
from icegrt.kernels.linear.inputs import HeadInputs, LogitsChunk
from icegrt.kernels.linear.products import ChunkedHead

ROWS = 9


def head_of(columns, dtype, temperature=0.7, start=0, entropy=True):
    """A head whose slice of the vocabulary begins at `start`; the passes over logits read no weight."""
    shard = VocabShard(None, 0, columns, columns)
    inputs = HeadInputs(
        torch.zeros(ROWS, 1, dtype=dtype),
        torch.zeros(columns, 1, dtype=dtype),
        torch.zeros(ROWS, dtype=torch.long),
        None,
        temperature,
        shard,
        None,
        None,
    )
    head = ChunkedHead.of(inputs, entropy)
    head.shard = SimpleNamespace(start=start, group=None)  # one without a group begins at 0
    return head


def logits_of(columns, dtype):
    """Rows with numbers of all sizes, -inf, NaN, and one without any finite logit."""
    generator = torch.Generator().manual_seed(columns)
    z = torch.randn(ROWS, columns, generator=generator, dtype=dtype) * 4
    z[1] *= 300
    z[2] -= 1e4
    z[3, ::2] = -torch.inf
    z[4] = -torch.inf
    z[5, columns // 2] = torch.nan
    z[6] = 88.0
    z[7, -1] = 2e4
    return z


@pytest.mark.parametrize("columns", [1, 3, 16, 63, 1024, 1025, 2600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("start", [0, 50])
def test_statistics_are_those_of_fp64(columns, dtype, start):
    head, z = head_of(columns, dtype, start=start), logits_of(columns, dtype)
    labels = torch.arange(ROWS) * 7 + 45  # some before the slice, some beyond
    stats = cpp.row_stats(head, z.clone(), labels)
    truth = vocab_rows.local_rows(z.double(), labels, head.shard, head.temperature, True).stats
    bound = 1e-6 if dtype == torch.float32 else 1e-14
    assert torch.equal(stats.max.isnan() | stats.sum_exp.isnan(), truth.sum_exp.isnan())
    numbers = ~truth.sum_exp.isnan()
    assert torch.equal(stats.max[numbers].double(), truth.max[numbers])
    torch.testing.assert_close(stats.label_logit.double(), truth.label_logit, rtol=0, atol=0, equal_nan=True)
    assert stats.sum_exp[4] == 0 and stats.sum_exp_shifted[4] == 0
    for ours, theirs in zip(stats[1::2], truth[1::2], strict=True):
        torch.testing.assert_close(ours[numbers].double(), theirs[numbers], rtol=bound, atol=20 * bound)


@pytest.mark.parametrize("columns", [1, 3, 63, 1025])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("active", [None, [0, 8, 2, 7, 6]])
def test_gradients_are_those_of_pytorch_in_fp64(columns, with_entropy, active):
    head, z = head_of(columns, torch.float32, entropy=with_entropy), logits_of(columns, torch.float32)
    wide_head = head_of(columns, torch.float64, entropy=with_entropy)
    labels = torch.arange(ROWS) * 5
    draw = torch.randn(2, ROWS, generator=torch.Generator().manual_seed(0))
    grads = TokenGrads(draw[0], draw[1] if with_entropy else None)
    rows = None if active is None else torch.tensor(active)

    def gradient(ops, of, logits, token_grads):
        local = ops.row_stats(of, logits, labels)
        chunk = LogitsChunk(slice(0, ROWS), logits[:, :0], labels, logits, local, RowStats(*local))
        dz, scale = ops.logits_grad(of, chunk, token_grads, rows)
        return dz if scale is None else dz * scale[:, None]

    ours = gradient(cpp, head, z.clone(), grads)
    theirs = gradient(torch_ops, wide_head, z.double(), TokenGrads(*(x if x is None else x.double() for x in grads)))
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-6, equal_nan=True)
    assert ours.shape[0] == (ROWS if active is None else len(active))
    # A row with NaN has it in every column, and no other row has any.
    kept = [*range(ROWS)] if active is None else active
    assert [row.isnan().all() for row in ours] == [n == 5 for n in kept]
    assert [row.isnan().any() for row in ours] == [n == 5 for n in kept]


def test_a_probability_of_zero_has_a_gradient_of_exactly_zero():
    head = head_of(4, torch.float32, temperature=1.0, entropy=False)
    z, labels = torch.tensor([[0.0, -torch.inf, -200.0, 1.0]]), torch.tensor([3])
    local = cpp.row_stats(head, z, labels)
    dz, _ = cpp.logits_grad(
        head, LogitsChunk(slice(0, 1), z, labels, z, local, local), TokenGrads(torch.ones(1), None), None
    )
    assert dz[0, 1] == 0 and dz[0, 2] == 0 and abs(float(dz.sum())) < 1e-7


@pytest.mark.parametrize("threads", [2, 3])
def test_rows_that_move_within_the_logits_do_not_depend_on_threads(threads):
    head, logits, labels = head_of(5003, torch.float32), torch.randn(64, 5003), torch.arange(64)
    grads = TokenGrads(torch.randn(64), torch.randn(64))
    grads.logprob[1::3], grads.entropy[1::3] = 0.0, 0.0
    active = _active_rows(*grads)
    assert active is not None and (active != torch.arange(len(active))).sum() > 10
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            z = logits.clone()
            local = cpp.row_stats(head, z, labels)
            chunk = LogitsChunk(slice(0, 64), z[:, :0], labels, z, local, local)
            results.append(cpp.logits_grad(head, chunk, grads, active)[0].clone())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_neither_threads_nor_entropy_nor_other_rows_change_a_bit(threads):
    z, labels = torch.randn(64, 5003), torch.arange(64)
    before = torch.get_num_threads()
    expected = cpp.row_stats(head_of(5003, torch.float32), z, labels)
    try:
        torch.set_num_threads(threads)
        found = cpp.row_stats(head_of(5003, torch.float32, entropy=False), z[10:].clone(), labels[10:])
    finally:
        torch.set_num_threads(before)
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(ours, theirs[10:])
    assert not found.sum_exp_shifted.any()


def test_a_cpu_takes_them_by_itself():
    hidden, weight, labels = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3), torch.arange(5)
    with record_launches() as launches:
        linear_logprobs(hidden, weight, labels, entropy=True)
        linear_ppo_loss(hidden, weight, labels, None, torch.ones(5), normalizer=1.0).loss.backward()
    assert [launch for launch in launches if launch[0].startswith("logit_")] == [
        ("logit_statistics", "cpp"),
        ("logit_statistics", "cpp"),
        ("logit_gradients", "cpp"),
    ]
    with record_launches() as launches, use_backend("chunked"):
        linear_logprobs(hidden, weight, labels)
    assert not launches
