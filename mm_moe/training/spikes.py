"""A threshold above which a loss or a gradient norm is a spike."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable

WINDOW = 128  # steps that are remembered
LEAST = 64  # steps that are needed before anything is called a spike
SIGMA_OF_MAD = 1.4826  # a Gaussian's standard deviation over its median absolute deviation
FLOOR = 0.01  # of the median: the least spread, so that a flat stretch does not make all a spike


class SpikeWindow:
    """Calls a value a spike that lies `sigma` spreads above the median of the last steps.

    The spread is that of a Gaussian with the window's median absolute deviation, so spikes that are
    in the window do not widen it. OLMo-core's rule is mean and standard deviation of the same
    number of steps, which the first spike blows up. Skipped values enter the window as well: after
    a lasting change of level the new one becomes the median.

    Args:
        sigma: how many spreads; 0 calls nothing a spike.
        values: of earlier steps, oldest first.
    """

    def __init__(self, sigma: float, values: Iterable[float] = ()) -> None:
        self.sigma = sigma
        self.values = deque(values, maxlen=WINDOW)

    @property
    def threshold(self) -> float:
        """The value from which on a step is a spike; infinite while too little is known."""
        if not self.sigma or len(self.values) < LEAST:
            return float("inf")
        middle = statistics.median(self.values)
        mad = statistics.median(abs(value - middle) for value in self.values)
        return middle + self.sigma * max(SIGMA_OF_MAD * mad, FLOOR * abs(middle))

    def add(self, value: float) -> bool:
        """Whether the value is a spike among those before it; it is remembered either way."""
        spike = value > self.threshold
        self.values.append(value)
        return spike
