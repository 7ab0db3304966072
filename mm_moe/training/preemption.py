"""Stopping on a signal: noted by one rank, agreed by all, saved at the same step.

A signal handler of ours only notes the signal. What it asks for happens where all ranks agree: at
the end of an optimizer step (in the one small all-reduce that `guard.StepGuard` makes anyway),
before each batch of an evaluation, and between the parts of a run. So one rank that is told to stop
stops all of them at the same step, and nothing is ever cut in the middle.

SIGTERM and SIGUSR1 (what Slurm can send before its time limit) mean preemption, SIGINT (Ctrl-C)
means a stop by hand; both save. A second Ctrl-C ends the process at once: checkpoints are published
by renaming, so what is being written then is lost but nothing that stands. Further SIGTERMs change
nothing, since launchers send one to every rank when the first rank has ended.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from mm_moe.errors import (
    EXIT_INTERRUPTED,
    InterruptedRunError,
    PreemptedError,
    StoppedError,
)
from mm_moe.training import runtime
from mm_moe.training.early_signals import EarlySignals

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ONE_PRESS_S = 1.0  # a launcher may pass on the Ctrl-C that the terminal gave to this process, too


class StopSignals:
    """Notes the signals that ask this process to stop, while it is entered.

    Args:
        early: what came since the program began; it has the signals until this is entered, and does
            not get them back.

    Attributes:
        received: the first such signal that this process got, 0 without any; SIGINT beats others.
        agreed: the signal by which all processes have decided to stop, 0 before that.
    """

    def __init__(self, early: EarlySignals | None = None) -> None:
        self.early = early or EarlySignals()
        self.received = 0
        self.agreed = 0
        self._previous: dict[int, Any] = {}
        self._interrupted_at = 0.0

    def __enter__(self) -> StopSignals:
        """Take over the signals; only a main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
            self._previous |= self.early.previous
            self.received = self.received or self.early.received
        return self

    def __exit__(self, *error: object) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            again = self.received == signal.SIGINT
            if again and time.monotonic() - self._interrupted_at > ONE_PRESS_S:
                os._exit(EXIT_INTERRUPTED)
            if not again:
                self._interrupted_at = time.monotonic()
        if not self.received or number == signal.SIGINT:
            self.received = number

    def agree(self, received: int) -> None:
        """Remember what the ranks together decided; 0 for nothing."""
        self.agreed = self.agreed or received

    def check(self, *, where: str) -> None:
        """Stop here if any rank was asked to. A collective.

        Args:
            where: what has happened so far, for the error's text.

        Raises:
            StoppedError: on every rank alike.
        """
        self.agree(strongest(runtime.gather_objects(self.received)))
        if self.agreed:
            raise self.error(where)

    def error(self, where: str) -> StoppedError:
        """What ends the run by the signal that was agreed on."""
        name = signal.Signals(self.agreed).name
        kind = InterruptedRunError if self.agreed == signal.SIGINT else PreemptedError
        return kind(f"{name}, {where}")


def strongest(received: list[int]) -> int:
    """The one signal that all ranks act on: a stop by hand before a preemption, 0 without any."""
    if signal.SIGINT in received:
        return int(signal.SIGINT)
    return max(received)


def ignore_in_worker(worker: int) -> None:
    """Let a data worker live on through a signal that its process group or launcher spreads.

    A worker that dies makes the next batch fail, before the rank can save. It ends with its rank.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopOnSignal(TrainerCallback):
    """Ends the training at the step at which the ranks agreed to stop, with a checkpoint of it.

    Args:
        signals: of this process.
        save: whether the stopped training is one that can be resumed.
    """

    def __init__(self, signals: StopSignals, *, save: bool) -> None:
        self.signals = signals
        self.save = save

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After every other callback's wish: save this step, and no further one."""
        if self.signals.agreed:
            control.should_save = self.save
            control.should_training_stop = True
