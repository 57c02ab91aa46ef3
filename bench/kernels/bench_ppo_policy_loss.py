"""ppo_policy_loss, forward and backward on packed tokens: Triton (on a GPU), reference, eager, torch.compile."""

import torch

from bench.kernels import token_losses
from icegrt.kernels import ppo_policy_loss


def plain(logprob, old, advantage):
    ratio = (logprob - old).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)).mean()


def draw(A, device):
    logprob = torch.randn(A, device=device) - 3
    return logprob, logprob + 0.1 * torch.randn_like(logprob), torch.randn_like(logprob)


if __name__ == "__main__":
    token_losses.run(__doc__, ppo_policy_loss, plain, draw)
