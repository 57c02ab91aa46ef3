"""What an estimator of the advantages consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from icegrt.config import PPOConfig
from icegrt.ppo.advantages.groups import Groups


@dataclass(frozen=True)
class Estimator:
    """An estimator. All begin with the recursion of `kernels.shaped_gae` over the rewards of the tokens.

    Attributes:
        discount: returns gamma and lambda of the recursion. Values are 0 without a critic, so that with lambda 1 an
            advantage is the discounted sum of the rewards from its token on.
        compare: `compare(groups, config)` returns one advantage per response, [N] float64, from the rewards of the
            responses to each prompt; all tokens of a response have it. None: the advantages of the recursion.
    """

    discount: Callable[[PPOConfig], tuple[float, float]]
    compare: Callable[[Groups, PPOConfig], Tensor] | None = None
