"""The prompts of an iteration and the actor's responses to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from icegrt.config import PPOConfig
from icegrt.data import Prompt
from icegrt.distributed.cluster import Cluster
from icegrt.ppo.dynamic_sampling import Selection, compare_scores, select_prompts
from icegrt.ppo.inference_checks import locate_reward_errors
from icegrt.ppo.rewards import RewardOutputs
from icegrt.ppo.setup import PPOComponents
from icegrt.residency import PARAMETERS
from icegrt.rollout.types import Response
from icegrt.utils.console import print_info, warn


class ResponseSampler:
    """Draws prompts and rolls out. All ranks call it together.

    Args:
        config: of the run.
        parts: prompts, engine, actor, and what scores.
        cluster: the ranks.
        timed: `timed(phase)` measures a block.
    """

    def __init__(
        self,
        config: PPOConfig,
        parts: PPOComponents,
        cluster: Cluster,
        timed: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._config, self._parts, self._cluster, self._timed = config, parts, cluster, timed
        self._cache_is_reported = self._filling_is_reported = False

    def sample(self, done_steps: int) -> tuple[list[Prompt], list[Response]]:
        """Return the next prompts, and the responses of all ranks to them.

        Args:
            done_steps: iterations before this one; they give the responses ids of their own.
        """
        prompts = self._draw(self._config.prompts_per_iteration)
        return prompts, self._roll_out(prompts, done_steps)

    def select(self, done_steps: int) -> Selection:
        """Draw prompts and roll out until enough of them have responses with different scores (dynamic sampling).

        Args:
            done_steps: as for `sample`.
        """
        config, first = self._config, done_steps * self._config.dynamic_sampling_max_rounds

        def score(responses: list[Response], prompts: list[Prompt]) -> tuple[RewardOutputs, Tensor]:
            with self._timed("score"), locate_reward_errors(f"iteration {done_steps + 1}"):
                return compare_scores(config, self._parts, self._cluster, responses, prompts)

        selection = select_prompts(
            config, self._draw, lambda prompts, number: self._roll_out(prompts, first + number), score
        )
        if selection.filled and not self._filling_is_reported:
            self._filling_is_reported = True
            warn(f"iteration {done_steps + 1}: {selection.shortage(config)}")
        return selection

    def _draw(self, count: int) -> list[Prompt]:
        return [self._parts.prompts[i] for i in self._parts.prompt_sampler.draw(count)]

    def _roll_out(self, prompts: Sequence[Prompt], number: int) -> list[Response]:
        """Return the responses of all ranks to the prompts; `number` of the rollout gives them ids of their own."""
        config, parts = self._config, self._parts
        with self._timed("rollout"), parts.actor.placement.hold(PARAMETERS):
            first_id = number * config.prompts_per_iteration * config.samples_per_prompt
            responses = parts.engine.generate(
                [p.tokens for p in prompts], config.samples_per_prompt, parts.sampling, first_sequence_id=first_id
            )
            if not self._cache_is_reported:
                print_info(parts.engine.cache_summary)
                self._cache_is_reported = True
            parts.engine.release()  # the KV cache leaves its memory to inference and update
        return responses
