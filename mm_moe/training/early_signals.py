"""Signals that come before anything is imported. Only the standard library is imported here.

The imports of a run take seconds, on a cold network disk a minute. A process that SIGTERM or
SIGUSR1 meets in this time would die by it, with a status that no scheduler takes for a preemption.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

PREEMPTING = (signal.SIGTERM, signal.SIGUSR1)


class EarlySignals:
    """Notes what asks this process to stop, until `preemption.StopSignals` acts on it.

    Attributes:
        received: the first such signal, 0 without any.
        previous: signal -> who had it before.
    """

    def __init__(self) -> None:
        self.received = 0
        self.previous: dict[int, Any] = {}

    def listen(self) -> EarlySignals:
        """Take over the signals; for the program itself, in its first lines."""
        self.previous = {number: signal.signal(number, self._note) for number in PREEMPTING}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
