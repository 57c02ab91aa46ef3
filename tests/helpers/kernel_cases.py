"""What the kernel tests share: error budgets and fp64 truths."""

import mmap

import torch


def worst(x, truth):
    """Largest absolute error against fp64, with equal infinities counting as equal."""
    x, truth = x.detach().double(), truth.detach().double()
    return torch.where(x == truth, 0.0, (x - truth).abs()).max().item() if x.numel() else 0.0


def assert_within_budget(ours, plain, truth, atol):
    """Our error against fp64 truth is at most twice that of same-dtype PyTorch, plus a small atol."""
    assert torch.isfinite(ours[torch.isfinite(truth)]).all()
    assert worst(ours, truth) <= 2 * worst(plain, truth) + atol, (worst(ours, truth), worst(plain, truth))


def plain_logprobs(logits, labels, temperature=1.0):
    """Log-prob and entropy by torch's own log_softmax, in the dtype that is passed in."""
    logp = torch.log_softmax(logits / temperature, dim=-1)
    ignored = labels == -100
    picked = logp.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    entropy = -torch.where(logp == -torch.inf, 0.0, logp.exp() * logp).sum(-1)
    return picked.masked_fill(ignored, 0.0), entropy.masked_fill(ignored, 0.0)


def virtual_rows(columns, dtype=torch.bfloat16):
    """[3, columns] of zeros, rows 2^30 + 8 elements apart, with as much memory before them as an offset wraps back.

    Pages that nobody touches cost nothing; an int32 offset to row 2 lands on one of them instead of on row 2.
    """
    elements = (1 << 32) + (1 << 20)
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which Python names since 3.13 only
    pages = mmap.mmap(-1, elements * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    return torch.frombuffer(pages, dtype=dtype).as_strided((3, columns), ((1 << 30) + 8, 1), 1 << 31)


def naive_gae(score, value, logprob, ref, cu, *, kl_coef, gamma, lam, bootstrap=None, mask=None, token_reward=None):
    """GAE token by token in Python floats (fp64), with the k1 penalty: the oracle of shaped_gae."""
    size = len(value)
    advantage, returns, reward = [0.0] * size, [0.0] * size, [0.0] * size
    kl = []
    for n in range(len(score)):
        rows = [t for t in range(int(cu[n]), int(cu[n + 1])) if mask is None or mask[t]]
        carry, following = 0.0, 0.0 if bootstrap is None else float(bootstrap[n])
        kl.append(sum(float(logprob[t]) - float(ref[t]) for t in rows))
        for t in reversed(rows):
            r = -kl_coef * (float(logprob[t]) - float(ref[t]))
            r += 0.0 if token_reward is None else float(token_reward[t])
            r += float(score[n]) if t == rows[-1] else 0.0
            carry = r + gamma * following - float(value[t]) + gamma * lam * carry
            advantage[t], returns[t], reward[t] = carry, carry + float(value[t]), r
            following = float(value[t])
    return tuple(torch.tensor(x, dtype=torch.float64) for x in (advantage, returns, reward, kl))
