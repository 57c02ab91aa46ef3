"""What the kernel tests share: error budgets, fp64 truths, packed action streams."""

import contextlib
import mmap
import sys

import torch

from icegrt.kernels import dispatch, kl_divergence, shaped_gae, use_backend
from icegrt.kernels.sample_tokens.reference import exponential_noise, row_keys


def widen(value):
    """Return a floating-point tensor in fp64, a sequence with its members widened, any other value as it is."""
    if isinstance(value, (list, tuple)):
        return [widen(member) for member in value]
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def worst(x, truth):
    """Return the largest absolute error against fp64, with equal infinities counting as equal."""
    x, truth = x.detach().double(), truth.detach().double()
    return torch.where(x == truth, 0.0, (x - truth).abs()).max().item() if x.numel() else 0.0


def assert_within_budget(fused, plain, truth, atol):
    """Assert that the error of `fused` is at most twice that of same-dtype PyTorch (`plain`), plus a small atol."""
    assert torch.isfinite(fused[torch.isfinite(truth)]).all()
    assert worst(fused, truth) <= 2 * worst(plain, truth) + atol, (worst(fused, truth), worst(plain, truth))


@contextlib.contextmanager
def module_constants(op, **constants):
    """Set constants of the module that implements `op` in Triton, a mutated one included, inside the `with`."""
    with use_backend("triton"):
        module = vars(sys.modules[dispatch.select(op).__module__])
    originals = {name: module[name] for name in constants}
    module.update(constants)
    try:
        yield
    finally:
        module.update(originals)


def plain_logprobs(logits, labels, temperature=1.0):
    """Return log-prob and entropy by torch's own log_softmax, in the dtype that is passed in."""
    logp = torch.log_softmax(logits / temperature, dim=-1)
    ignored = labels == -100
    picked = logp.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    entropy = -torch.where(logp == -torch.inf, 0.0, logp.exp() * logp).sum(-1)
    return picked.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0)


def virtual_rows(columns, dtype=torch.bfloat16):
    """Return [3, columns] of zeros, rows 2^30 + 8 elements apart, behind as much memory as an offset wraps back.

    Pages that are never touched cost nothing. An int32 offset to row 2 lands on one of them instead of on row 2.
    """
    elements = (1 << 32) + (1 << 20)
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which Python names since 3.13 only
    pages = mmap.mmap(-1, elements * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(pages, dtype=dtype).as_strided((3, columns), ((1 << 30) + 8, 1), 1 << 31)


def gae_streams(lengths, slack=0, dtype=torch.float32, seed=0):
    """Return score [N], value, log-prob and reference log-prob [A] each, and cu_actions [N + 1] of drawn sequences.

    Args:
        lengths: Actions of each sequence; an empty one has score 0.
        slack: Entries behind the last sequence.
    """
    torch.manual_seed(seed)
    cu_actions = torch.tensor([0, *torch.tensor(lengths, dtype=torch.long).cumsum(0).tolist()], dtype=torch.int32)
    size = int(cu_actions[-1]) + slack
    score = torch.where(cu_actions.diff() > 0, torch.randn(len(lengths)), 0.0)
    return [score.to(dtype), *(torch.randn(size, dtype=dtype) for _ in range(3)), cu_actions]


def drawn_mask(cu_actions, size):
    """Return a random mask [size] that keeps the first action of every sequence."""
    mask = torch.rand(size) > 0.4
    mask[cu_actions[:-1][cu_actions.diff() > 0].long()] = True
    return mask


def naive_gae(
    score,
    value,
    logprob,
    ref,
    cu,
    *,
    kl_coef,
    gamma,
    lam,
    lam_value=None,
    unit="token",
    bootstrap=None,
    mask=None,
    token_reward=None,
):
    """Compute GAE unit by unit in Python floats (fp64), with the k1 penalty: the oracle of shaped_gae.

    Returns:
        Advantages, returns and rewards [A], and the KL of each sequence [N].
    """
    size = len(value)
    advantage, returns, reward = [0.0] * size, [0.0] * size, [0.0] * size
    kl = []
    for n in range(len(score)):
        lam_n, lam_value_n = (
            float(x[n]) if isinstance(x, torch.Tensor) else x for x in (lam, lam if lam_value is None else lam_value)
        )
        rows = [t for t in range(int(cu[n]), int(cu[n + 1])) if mask is None or mask[t]]
        kl.append(sum(float(logprob[t]) - float(ref[t]) for t in rows))
        for t in rows:
            reward[t] = -kl_coef * (float(logprob[t]) - float(ref[t]))
            reward[t] += 0.0 if token_reward is None else float(token_reward[t])
            reward[t] += float(score[n]) if t == rows[-1] else 0.0
        units = []
        for t in rows:
            if unit == "turn" and units and units[-1][-1] == t - 1:
                units[-1].append(t)
            else:
                units.append([t])
        carry, target, following = 0.0, 0.0, 0.0 if bootstrap is None else float(bootstrap[n])
        for tokens in reversed(units):
            current = float(value[tokens[0]])
            delta = sum(reward[t] for t in tokens) + gamma * following - current
            carry = delta + gamma * lam_n * carry
            target = delta + gamma * lam_value_n * target
            for t in tokens:
                advantage[t] = carry
            returns[tokens[0]] = target + current
            following = current
    return tuple(torch.tensor(x, dtype=torch.float64) for x in (advantage, returns, reward, kl))


def drawn_lambdas(sequences, seed=0):
    """Return a lambda for each sequence, 0 and 1 among them."""
    return torch.randint(0, 11, (sequences,), generator=torch.Generator().manual_seed(seed)) / 10


def check_filtered_tokens(estimator):
    """Assert that shaped_gae penalises log-probs of -inf by what kl_divergence returns for them."""
    logprob = torch.tensor([-torch.inf, -1.0, -torch.inf, -1.0, -2.0, -1.5])
    ref = torch.tensor([-1.0, -torch.inf, -torch.inf, -2.0, -1.0, -1.5])
    zeros = torch.zeros(6)
    out = shaped_gae(zeros[:1], zeros, logprob, ref, torch.tensor([0, 6]), kl_coef=0.5, kl_estimator=estimator)
    with use_backend("reference"):
        kl = kl_divergence(logprob, ref, estimator)
    assert kl.isfinite().all() and out.advantage_A.isfinite().all()
    torch.testing.assert_close(out.reward_A, -0.5 * kl)
    torch.testing.assert_close(out.kl_N, kl.sum()[None])


def near_ties(rows, temperature, level=-1e4, columns=40):
    """Return logits near `level` whose two candidates nearly tie under the noise of seed 0, and the tokens drawn.

    Row n has the sequence id n and position 0. The winner is ahead by 2e-5 to 6e-4, computed in fp64; a quotient of
    -1e4 in fp32 is off by up to 5e-4.
    """
    ids = torch.arange(4 * rows)
    gumbel = -exponential_noise(row_keys(0, ids, torch.zeros_like(ids)), 0, columns).double().log()
    logits = torch.full((4 * rows, columns), -torch.inf)
    logits[:, 3] = level
    logits[:, 20] = (level + temperature * (gumbel[:, 3] - gumbel[:, 20])).float()
    perturbed = logits.double() / temperature + gumbel
    ahead = (perturbed[:, 3] - perturbed[:, 20]).abs()
    ids = ids[(ahead > 2e-5) & (ahead < 6e-4)][:rows]
    assert len(ids) == rows
    return logits[ids], ids, perturbed[ids].argmax(-1)
