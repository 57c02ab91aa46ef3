"""Vocabulary shards through the Triton kernels on gloo ranks, under the interpreter."""

import gc

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from icegrt.kernels import VocabShard, linear_logprobs, linear_ppo_loss, record_launches, token_logprobs, use_backend
from tests.helpers.kernel_cases import assert_within_budget

VOCAB, PADDED, ROWS, WIDTH = 37, 44, 9, 6
CUTS = {2: [0, 16, 44], 3: [0, 5, 38, 44]}  # uneven; the last rank of three holds padding only


def answers(backend, hidden, weight, labels, old, advantage, shard):
    """Every operation's results and gradients, by name; those of the weight for this slice."""
    found = {}
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    options = {"temperature": 0.7, "shard": shard}
    with use_backend(backend), record_launches() as launches:
        logits = (hidden.detach() @ weight.detach().t()).requires_grad_()
        scored = token_logprobs(logits, labels, entropy=True, **options)
        (scored.logprob_A * advantage + scored.entropy_A).sum().backward()
        found |= {"token": scored.logprob_A, "token entropy": scored.entropy_A, "by logits": logits.grad}
        linear = linear_logprobs(hidden, weight, labels, entropy=True, chunk_rows=4, **options)
        (linear.logprob_A * advantage + linear.entropy_A).sum().backward()
        found |= {"linear": linear.logprob_A, "by hidden": hidden.grad.clone(), "by weight": weight.grad.clone()}
        hidden.grad = weight.grad = None
        objective = {"normalizer": 3.0, "entropy_coef": 0.1, "mask_A": torch.arange(ROWS) % 4 != 1, "chunk_rows": 4}
        out = linear_ppo_loss(hidden, weight, labels, old, advantage, **objective, **options)
        out.loss.backward()
        found |= {"loss": out.loss, "loss by hidden": hidden.grad, "loss by weight": weight.grad}
    assert bool(launches) == (backend == "triton")
    return found


def worker(rank, world, path):
    gc.freeze()  # what the parent holds stays unfreed here: its process groups' threads did not come along
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    start, stop = CUTS[world][rank : rank + 2]
    generator = torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(ROWS, WIDTH, generator=generator), torch.randn(PADDED, WIDTH, generator=generator)
    labels = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    labels[4] = -100
    old, advantage = torch.randn(2, ROWS, generator=generator)
    streams, whole = (labels, old - 4, advantage), VocabShard(None, 0, PADDED, VOCAB)
    ours = answers(
        "triton", hidden, weight[start:stop], *streams, VocabShard(dist.group.WORLD, start, stop - start, VOCAB)
    )
    plain = answers("reference", hidden, weight, *streams, whole)
    wide = [x.double() if x.is_floating_point() else x for x in (hidden, weight, *streams)]
    truth = answers("reference", *wide, whole)
    for name, mine in ours.items():
        rows = (Ellipsis, slice(start, stop)) if name == "by logits" else slice(start, stop)
        cut = (lambda x, rows=rows: x[rows]) if name in ("by logits", "by weight", "loss by weight") else lambda x: x
        if cut(truth[name]).numel():
            assert_within_budget(mine, cut(plain[name]), cut(truth[name]), 2e-5)
        if cut(truth[name]) is truth[name]:  # what does not depend on the slice has the same bits on every rank
            parts = [torch.empty_like(mine) for _ in range(world)]
            dist.all_gather(parts, mine.detach().contiguous())
            assert all(torch.equal(p, parts[0]) for p in parts), name
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_shards_agree_with_the_whole(world, tmp_path):
    mp.start_processes(worker, args=(world, tmp_path / "store"), nprocs=world, start_method="fork")
