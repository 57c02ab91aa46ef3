"""value_loss, forward and backward on packed tokens: Triton (on a GPU), reference, eager, torch.compile."""

import torch

from bench.kernels import token_losses
from icegrt.kernels import value_loss


def plain(value, old, returns):
    bounded = old + (value - old).clamp(-0.2, 0.2)
    return 0.5 * torch.maximum((value - returns) ** 2, (bounded - returns) ** 2).mean()


def draw(A, device):
    return torch.randn(3, A, device=device).unbind()


if __name__ == "__main__":
    token_losses.run(__doc__, value_loss, plain, draw)
