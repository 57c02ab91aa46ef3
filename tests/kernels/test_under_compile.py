"""Under torch.compile a Python float may arrive as an fp64 scalar: results must be the eager ones, dtype and bits."""

import pytest
import torch

from icegrt.kernels import (
    kl_divergence,
    linear_logprobs,
    linear_ppo_loss,
    masked_moments,
    ppo_policy_loss,
    rms_norm,
    sample_tokens,
    shaped_gae,
    token_logprobs,
    value_loss,
    whiten,
)

A, V = 5, 11


def calls(x, hidden, weight):
    labels, cu = torch.arange(A), torch.tensor([0, 2, A])
    score, ref = torch.ones(2), torch.zeros(A)
    keys = {"seed": 0, "sequence_ids": labels, "positions": labels}
    policy = {"normalizer": 5.0, "kl_coef": 0.1, "ref_logprob_A": ref}
    return {
        "token_logprobs": lambda t: token_logprobs(hidden @ weight.t(), labels, temperature=t).logprob_A,
        "linear_logprobs": lambda t: linear_logprobs(hidden, weight, labels, temperature=t).logprob_A,
        "linear_ppo_loss": lambda t: linear_ppo_loss(hidden, weight, labels, None, x, temperature=t, **policy).loss,
        "ppo_policy_loss": lambda t: ppo_policy_loss(x, x * 2, x, clip_low=t, **policy).loss,
        "value_loss": lambda t: value_loss(x, x * 2, x, normalizer=5.0, clip=t).loss,
        "kl_divergence": lambda t: kl_divergence(x, x * t, "k3"),
        "shaped_gae": lambda t: shaped_gae(score, x, x, ref, cu, kl_coef=t, lam=t).advantage_A,
        "rms_norm": lambda t: rms_norm(hidden, weight[0], eps=t),
        "whiten": lambda t: whiten(x, masked_moments(x), eps=t),
        "sample_tokens": lambda t: sample_tokens(hidden @ weight.t(), temperature=t, **keys)[1],
    }


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.parametrize("labels_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("name", ["logprobs", "loss"])
def test_gradients_of_the_linear_operations_are_the_eager_ones(name, labels_dtype):
    """A copy that is made for a call of the extension must outlive it: dynamo frees what is not read any more."""
    generator = torch.Generator().manual_seed(0)
    x, hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((64,), (64, 4), (V, 4)))
    labels = (torch.arange(64) % V).to(labels_dtype)

    def call(h, w, t):
        if name == "logprobs":
            out = linear_logprobs(h, w, labels, temperature=t, entropy=True)
            return (out.logprob_A * x).sum() + out.entropy_A.square().sum()
        return linear_ppo_loss(h, w, labels, None, x, temperature=t, normalizer=3.0, entropy_coef=0.1).loss

    torch.compiler.reset()
    results = []
    for function in (call, torch.compile(call, backend="eager", dynamic=True)):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = function(*leaves, 0.7)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_python_floats_change_neither_dtype_nor_bits():
    generator = torch.Generator().manual_seed(0)
    x, hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((A,), (A, 4), (V, 4)))
    for name, call in calls(x, hidden.requires_grad_(), weight.requires_grad_()).items():
        torch.compiler.reset()
        compiled = torch.compile(call, backend="eager", dynamic=True)
        for number in (0.7, 0.9):  # the second time the float is no constant any more
            plain, out = call(number), compiled(number)
            assert out.dtype == torch.float32 and torch.equal(out, plain), name
