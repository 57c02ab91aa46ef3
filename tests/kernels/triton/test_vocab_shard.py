"""Vocabulary shards through the Triton kernels on gloo ranks, under the interpreter."""

import gc

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from icegrt.kernels import VocabShard, linear_logprobs, linear_ppo_loss, record_launches, token_logprobs, use_backend
from tests.helpers.kernel_cases import assert_within_budget, widen

VOCAB, PADDED, ROWS, WIDTH = 37, 44, 9, 6
CUTS = {2: [0, 16, 44], 3: [0, 5, 38, 44]}  # uneven; the last rank of three holds padding only


def results_by_name(backend, hidden, weight, labels, old, advantage, shard):
    """Return every operation's results and gradients; the weight's gradients are those of the shard."""
    results = {}
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    options = {"temperature": 0.7, "shard": shard}
    with use_backend(backend), record_launches() as launches:
        logits = (hidden.detach() @ weight.detach().t()).requires_grad_()
        scored = token_logprobs(logits, labels, entropy=True, **options)
        (scored.logprob_A * advantage + scored.entropy_A).sum().backward()
        results |= {"token": scored.logprob_A, "token entropy": scored.entropy_A, "by logits": logits.grad}
        linear = linear_logprobs(hidden, weight, labels, entropy=True, chunk_rows=4, **options)
        (linear.logprob_A * advantage + linear.entropy_A).sum().backward()
        results |= {"linear": linear.logprob_A, "by hidden": hidden.grad.clone(), "by weight": weight.grad.clone()}
        hidden.grad = weight.grad = None
        objective = {"normalizer": 3.0, "entropy_coef": 0.1, "mask_A": torch.arange(ROWS) % 4 != 1, "chunk_rows": 4}
        out = linear_ppo_loss(hidden, weight, labels, old, advantage, **objective, **options)
        out.loss.backward()
        results |= {"loss": out.loss, "loss by hidden": hidden.grad, "loss by weight": weight.grad}
    assert bool(launches) == (backend == "triton")
    return results


def worker(rank, world, path):
    gc.freeze()  # the parent's process groups must not be freed here: their threads did not come along
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    start, stop = CUTS[world][rank : rank + 2]
    generator = torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(ROWS, WIDTH, generator=generator), torch.randn(PADDED, WIDTH, generator=generator)
    labels = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    labels[4] = -100
    old, advantage = torch.randn(2, ROWS, generator=generator)
    streams = (labels, old - 4, advantage)
    shard = VocabShard(dist.group.WORLD, start, stop - start, VOCAB)
    full_vocabulary = VocabShard(None, 0, PADDED, VOCAB)
    fused_results = results_by_name("triton", hidden, weight[start:stop], *streams, shard)
    plain_results = results_by_name("reference", hidden, weight, *streams, full_vocabulary)
    truths = results_by_name("reference", *widen([hidden, weight, *streams]), full_vocabulary)
    for name, fused in fused_results.items():
        plain, truth = plain_results[name], truths[name]
        if name == "by logits":
            plain, truth = plain[:, start:stop], truth[:, start:stop]
        elif name in ("by weight", "loss by weight"):
            plain, truth = plain[start:stop], truth[start:stop]
        else:  # results that do not depend on the shard have the same bits on every rank
            rank_results = [torch.empty_like(fused) for _ in range(world)]
            dist.all_gather(rank_results, fused.detach().contiguous())
            assert all(torch.equal(result, rank_results[0]) for result in rank_results), name
        if truth.numel():
            assert_within_budget(fused, plain, truth, 2e-5)
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_shards_agree_with_the_whole(world, tmp_path):
    mp.start_processes(worker, args=(world, tmp_path / "store"), nprocs=world, start_method="fork")
