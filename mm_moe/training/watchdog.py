"""A thread in every process that ends it when training stands still, and says where it stood.

A process that is stopped, or stuck in a driver or a file system, says nothing: the others wait for
it in their next collective. They are who can tell, so every process watches itself, and one that
waits too long writes the stacks of all its threads and ends with `EXIT_LOST_RANK`; its launcher
then ends the rest. Nothing is asked of the other processes, so no collective is needed.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from mm_moe.errors import EXIT_LOST_RANK
from mm_moe.training import runtime

START, DATA, STEP = "start-up", "waiting for data", "forward, backward and update"
SAVE, EVALUATE, END = "saving", "evaluating", "work after training"
SLOW_FACTOR, SLOW_AT_LEAST_S = 4, 1800.0  # phases that may take as long as the data or disks need
DEFAULT_DDP_TIMEOUT_S = 1800  # of transformers
LAST_WORDS_S = 10.0  # a dump into a file system that hangs must not keep the process alive


def slow_limit_s(hang_timeout_s: float) -> float:
    """What start-up, first step, evaluation, saving and the work after training may take."""
    return max(SLOW_FACTOR * hang_timeout_s, SLOW_AT_LEAST_S)


def collective_timeout_s(hang_timeout_s: float, *, ddp_timeout_s: float) -> float:
    """How long a collective may wait: longer than the watchdog, which has more to say.

    A `--ddp_timeout` of the user's own is kept.
    """
    if not hang_timeout_s or ddp_timeout_s != DEFAULT_DDP_TIMEOUT_S:
        return ddp_timeout_s
    return slow_limit_s(hang_timeout_s) + 60


class Watchdog:
    """Ends the process when no `beat` comes for too long.

    Time counts only while this process runs: a job that is suspended as a whole, or a laptop that
    sleeps, is not taken for one that hangs, because each tick of the watch counts at most twice
    its period.

    A hang inside a C extension that holds the interpreter's lock stops this thread as well; then
    the other processes notice.

    Args:
        folder: of the run; takes `stacks-RANK.txt`.
        limit_s: seconds without a beat; 0 watches nothing.
        period_s: of the watch; a tenth of the limit, at most a second.
        leave: ends the process with a status.
        clock: seconds, of any origin.
    """

    def __init__(
        self,
        folder: Path,
        *,
        limit_s: float,
        leave: Callable[[int], Any] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self.limit_s = limit_s
        self.period_s = min(1.0, limit_s / 10)
        self.phase, self.step = START, 0
        self._slow = True
        self._silent_s = 0.0
        self._last_tick: float | None = None
        self._leave, self._clock = leave, clock
        self._stopped = threading.Event()

    @property
    def allowed_s(self) -> float:
        """Seconds that the present phase may take."""
        return slow_limit_s(self.limit_s) if self._slow else self.limit_s

    def start(self) -> None:
        """Start to watch, from another thread that dies with the process."""
        if self.limit_s:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()

    def beat(self, phase: str, *, step: int = 0, slow: bool = False) -> None:
        """Training moves: say what it does now, at which step, and whether that may take long."""
        self.phase, self.step, self._slow = phase, step, slow
        self._silent_s = 0.0

    def tick(self) -> bool:
        """Count the time since the last tick; whether the limit is passed."""
        now = self._clock()
        if self._last_tick is not None:
            self._silent_s += min(now - self._last_tick, 2 * self.period_s)
        self._last_tick = now
        return self._silent_s >= self.allowed_s

    def _watch(self) -> None:
        while not self._stopped.wait(self.period_s):
            if self.tick():
                self.give_up()
                return

    def give_up(self) -> None:
        """Say where every thread stands and end the process."""
        last = threading.Timer(LAST_WORDS_S, self._leave, [EXIT_LOST_RANK])
        last.daemon = True
        last.start()
        file = self.folder / f"stacks-{runtime.rank()}.txt"
        said = (
            f"rank {runtime.rank()} stood still for {self._silent_s:.0f} s in phase "
            f"'{self.phase}' at step {self.step}"
        )
        sys.stderr.write(
            f"\nerror: {said}: a process of this run is stopped or hangs. Where it stood: {file}. "
            "Start again with --resume_from_checkpoint auto; if a step may take so long, give a "
            f"larger --hang_timeout_s (now {self.limit_s:g}; 0 is off).\n"
        )
        sys.stderr.flush()
        try:
            with file.open("w") as stream:
                stream.write(f"{said}\n\n")
                stream.flush()
                faulthandler.dump_traceback(stream)
        finally:
            self._leave(EXIT_LOST_RANK)


class Heartbeat(TrainerCallback):
    """Tells the watchdog what the training loop does; must come after what asks for saves."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog = watchdog
        self._begun_at = 0

    def _beat(self, phase: str, state, *, slow: bool = False) -> None:
        self.watchdog.beat(phase, step=state.global_step, slow=slow)

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        """The first step, with what is built for it, may take long; groups wait as long as all."""
        self._begun_at = state.global_step
        self._beat(START, state, slow=True)
        limit_s = self.watchdog.limit_s
        wait_alike(collective_timeout_s(limit_s, ddp_timeout_s=args.ddp_timeout))

    def on_step_begin(self, args, state, control, **kwargs: Any) -> None:
        """The batches of a step are there."""
        self._beat(STEP, state, slow=state.global_step == self._begun_at)

    def on_substep_end(self, args, state, control, **kwargs: Any) -> None:
        """One micro-batch of several is done."""
        self.on_step_begin(args, state, control)

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        """What comes next is asked for in `control`."""
        if control.should_evaluate:
            self._beat(EVALUATE, state, slow=True)
        else:
            self.on_evaluate(args, state, control)

    def on_evaluate(self, args, state, control, **kwargs: Any) -> None:
        """Evaluated; a save comes after it."""
        self._beat(SAVE if control.should_save else DATA, state, slow=control.should_save)

    def on_save(self, args, state, control, **kwargs: Any) -> None:
        """Saved."""
        self._beat(DATA, state)

    def on_train_end(self, args, state, control, **kwargs: Any) -> None:
        """Weights are written and scores made, or another model is built."""
        self._beat(END, state, slow=True)


def wait_alike(timeout_s: float) -> None:
    """Give every process group the same timeout.

    Groups that DeepSpeed makes for experts do not take over that of the run: 10 minutes with NCCL,
    30 with gloo.
    """
    if not dist.is_initialized():
        return
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.set_timeout(timedelta(seconds=timeout_s), group)
