"""linear_ppo_loss in other people's loops: plain transformers with AdamW, autocast, gradient checkpointing, DDP, FSDP2.

The same losses are trained through the plain composition (logits, then ppo_policy_loss), and weights must agree.
"""

import gc

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch import nn

from icegrt.kernels import linear_logprobs, linear_ppo_loss, pack_padded, ppo_policy_loss, token_logprobs

VOCAB, WIDTH = 29, 16
OLD_LOGPROB = -3.4  # near log(1 / VOCAB): some ratios are clipped, some are not


def batch(rows=4, length=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, length), generator=generator)
    attended = torch.ones_like(ids)
    attended[0, -2:] = 0
    response = ((torch.arange(length) >= 4) & (attended != 0)).long()
    return ids, attended, response, torch.randn(rows, length, generator=generator)


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
        )
    )


class Policy(nn.Module):
    """A transformers model and its loss in one module: what DDP and FSDP2 wrap, so that the loss gets the full head.

    The old log-probs are a constant, so that ratios differ from 1.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.model = llama()

    def forward(self, ids, attended, response, advantage, normalizer, fused=True):
        packed = pack_padded(ids, attended, response)
        hidden = self.model.model(input_ids=ids, attention_mask=attended).last_hidden_state.flatten(0, 1)
        hidden, weight = hidden[packed.action_rows_A], self.model.lm_head.weight
        old_A, advantage_A = torch.full((packed.action_rows_A.numel(),), OLD_LOGPROB), packed.select(advantage)
        if fused:
            out = linear_ppo_loss(hidden, weight, packed.action_tokens_A, old_A, advantage_A, normalizer=normalizer)
        else:
            with torch.autocast("cpu", enabled=False):
                scored = token_logprobs(hidden.to(weight.dtype) @ weight.t(), packed.action_tokens_A)
            out = ppo_policy_loss(scored.logprob_A, old_A, advantage_A, normalizer=normalizer)
        return out.loss


def trained_alone(fused=False, steps=3):
    model = Policy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        micro_batch = batch(seed=step)
        optimizer.zero_grad()
        model(*micro_batch, normalizer=float(micro_batch[2].sum()), fused=fused).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


# transformers 5 deprecates the method for one that its first releases do not have.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_plain_transformers_loop_with_adamw(checkpointing):
    def train(fused):
        torch.manual_seed(1)
        model = llama()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        ids, attended, response, advantage = batch()
        packed = pack_padded(ids, attended, response)
        losses, old_A = [], None
        for _ in range(3):
            hidden = model.model(input_ids=ids, attention_mask=attended).last_hidden_state.flatten(0, 1)
            rows, weight = hidden[packed.action_rows_A], model.lm_head.weight
            if old_A is None:
                with torch.no_grad():
                    old_A = linear_logprobs(rows, weight, packed.action_tokens_A).logprob_A
            options = {"normalizer": float(old_A.numel())}
            if fused:
                out = linear_ppo_loss(rows, weight, packed.action_tokens_A, old_A, packed.select(advantage), **options)
            else:
                scored = token_logprobs(rows @ weight.t(), packed.action_tokens_A)
                out = ppo_policy_loss(scored.logprob_A, old_A, packed.select(advantage), **options)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            losses.append(out.loss.item())
        return losses, [p.detach() for p in model.parameters()]

    fused_losses, fused_parameters = train(True)
    plain_losses, plain_parameters = train(False)
    assert fused_losses == pytest.approx(plain_losses, abs=1e-5) and fused_losses[-1] < fused_losses[0]
    for fused, plain in zip(fused_parameters, plain_parameters, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-4)


def test_inside_a_reentrant_or_plain_checkpoint():
    """The forward runs twice there, once without gradients: what it forms must come from the second run."""
    expected = torch.autograd.grad(
        Policy()(*batch(), normalizer=7.0), (model := Policy()).model.lm_head.weight, allow_unused=True
    )
    assert expected == (None,)
    micro_batch = batch()
    expected_grads = torch.autograd.grad(model(*micro_batch, normalizer=7.0), list(model.parameters()))

    def forward(anchor):
        return model(*micro_batch, normalizer=7.0) + anchor

    for reentrant in (True, False):
        anchor = torch.zeros((), requires_grad=True)
        loss = torch.utils.checkpoint.checkpoint(forward, anchor, use_reentrant=reentrant)
        model.zero_grad()
        loss.backward()
        for parameter, grad in zip(model.parameters(), expected_grads, strict=True):
            torch.testing.assert_close(parameter.grad, grad)


def test_a_transformers_model_under_autocast():
    """Its layers compute in bfloat16; from the hidden states on, loss and gradients are those of fp32."""
    micro_batch, grads = batch(), []
    for fused in (True, False):
        model = Policy()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(*micro_batch, normalizer=7.0, fused=fused)
        loss.backward()
        assert loss.dtype == torch.float32
        grads.append([loss.detach(), *(p.grad for p in model.parameters())])
    for fused, plain in zip(*grads, strict=True):
        assert fused.dtype == plain.dtype == torch.float32
        assert (fused - plain).norm() <= 1e-4 * plain.norm()


def test_autocast_never_rounds_the_logits():
    hidden, weight = torch.randn(24, 64, requires_grad=True), (torch.randn(1003, 64) * 0.3).requires_grad_()
    labels = torch.arange(24)
    truth = torch.log_softmax(hidden.double() @ weight.double().t(), -1).gather(1, labels[:, None]).squeeze(1)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_logprobs(hidden, weight, labels)
        loss = linear_ppo_loss(hidden, weight, labels, out.logprob_A.detach(), torch.ones(24), normalizer=24.0)
        mixed = linear_logprobs(hidden.bfloat16(), weight, labels)  # as autocast's layers return them
    assert (out.logprob_A.double() - truth).abs().max() < 1e-5 and loss.stats.ratio_max == 1
    loss.loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    rounded = torch.log_softmax(hidden.bfloat16().double() @ weight.double().t(), -1).gather(1, labels[:, None])
    assert (mixed.logprob_A.double() - rounded.squeeze(1)).abs().max() < 1e-5
    with pytest.raises(TypeError, match=r"hidden_AH and weight_VH must have one dtype.*bfloat16 and torch.float32"):
        linear_logprobs(hidden.bfloat16(), weight, labels)


def worker(rank, world, path, wrapper):
    gc.freeze()  # the parent's process groups must not be freed here: their threads did not come along
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    train_as_one_of_several(rank, world, wrapper)
    # DDP must be gone before the group is: as its last owner it would join gloo's threads while it holds the
    # interpreter's lock, which one of them may be waiting for.
    gc.collect()
    dist.destroy_process_group()


def train_as_one_of_several(rank, world, wrapper):
    expected, model = trained_alone(), Policy()
    if wrapper == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        head = model.model.lm_head.weight
        with pytest.raises(TypeError, match=r"linear_logprobs: weight_VH must be a plain tensor, got a DTensor"):
            linear_logprobs(torch.zeros(1, WIDTH), head, torch.zeros(1, dtype=torch.long))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    local_rows = slice(0, 1) if rank == 0 else slice(1, 4)  # uneven: a mean of means would be wrong
    for step in range(3):
        micro_batch = batch(seed=step)
        optimizer.zero_grad()
        loss = model(*(x[local_rows] for x in micro_batch), normalizer=float(micro_batch[2].sum()))
        (loss * world).backward()  # both average over ranks, and the loss is a sum
        optimizer.step()
    for parameter, expected_parameter in zip(model.parameters(), expected, strict=True):
        gathered = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        torch.testing.assert_close(gathered.detach(), expected_parameter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_two_ranks_train_what_one_does(wrapper, tmp_path):
    mp.start_processes(worker, args=(2, tmp_path / "store", wrapper), nprocs=2, start_method="fork")


def test_double_backward_is_refused_by_name():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    labels = torch.arange(3)
    for op, loss in (
        ("linear_ppo_loss", linear_ppo_loss(hidden, weight, labels, None, torch.ones(3), normalizer=1.0).loss),
        ("linear_logprobs", linear_logprobs(hidden, weight, labels).logprob_A.sum()),
    ):
        with pytest.raises(RuntimeError, match=f"{op}: double backward is not supported"):
            torch.autograd.grad(loss, hidden, create_graph=True)


def test_devices_that_differ_are_refused_by_name():
    hidden, labels = torch.zeros(2, 4), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="weight_VH must be on cpu like the other tensors, got meta"):
        linear_logprobs(hidden, torch.zeros(5, 4, device="meta"), labels)
    with pytest.raises(ValueError, match="advantage_A must be on cpu"):
        linear_ppo_loss(hidden, torch.zeros(5, 4), labels, None, torch.zeros(2, device="meta"), normalizer=1.0)
