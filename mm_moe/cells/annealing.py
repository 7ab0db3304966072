"""Weights that change from step to step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mm_moe.errors import ConfigError


class KLAnnealer:
    """The weight of the KL divergence: flat, then a line, then flat.

    At step s it is `low` up to and with s = warmup, `high` from s = warmup + climb on, and on the
    line between in between. A climb of 0 jumps behind the warm-up.

    Args:
        low: at the start.
        high: at the end.
        warmup: steps at `low`.
        climb: steps from `low` to `high`.

    Attributes:
        steps: taken so far; what a checkpoint keeps.

    Raises:
        ConfigError: a negative number.
    """

    def __init__(self, *, low: float, high: float, warmup: int = 0, climb: int = 0) -> None:
        if min(low, high, warmup, climb) < 0 or not all(map(math.isfinite, (low, high))):
            raise ConfigError(
                f"the KL weight goes from {low} to {high} in {climb} steps after {warmup}: none of "
                "them may be negative."
            )
        self.low, self.high, self.warmup, self.climb = low, high, warmup, climb
        self.steps = 0

    @property
    def weight(self) -> float:
        """Of the step that comes."""
        beyond = self.steps - self.warmup
        if beyond <= 0 and (self.climb or self.warmup):
            return self.low
        if beyond >= self.climb:
            return self.high
        return self.low + (self.high - self.low) * beyond / self.climb

    def step(self) -> None:
        """One optimizer step was taken."""
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The steps."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.steps = int(state["steps"])

    def dealt(
        self, states: Sequence[dict[str, Any]], *, rank: int, world_size: int
    ) -> dict[str, Any]:
        """All ranks count alike."""
        return states[0]


def reversal_weight(progress: float) -> float:
    """2 / (1 + exp(-10 p)) - 1 of a progress p from 0 to 1 (Ganin et al. 2016): from 0 to 1."""
    return 2 / (1 + math.exp(-10 * min(max(progress, 0.0), 1.0))) - 1
