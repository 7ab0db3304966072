"""Saves a run's checkpoints, at once or beside training, and decides what a failed save means.

Only rank 0 writes. Whether it could is told to all ranks at the next point where they all are: no
rank ever waits for one that failed.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mm_moe.checkpoint import store
from mm_moe.errors import CheckpointError
from mm_moe.training import runtime
from mm_moe.training.state import Snapshot

logger = logging.getLogger("mm_moe")
WARN, STOP = "warn", "stop"
MOST_FAILURES = 3  # in a row, before a run that only warns stops as well


@dataclass
class Outcome:
    """How a write ended, known on rank 0 as soon as it is over.

    Attributes:
        problem: what went wrong; empty if nothing did.
        durable: whether the checkpoint can be resumed from all the same.
    """

    problem: str = ""
    durable: bool = False


class Saver:
    """Writes `checkpoint-STEP` folders of one run.

    Args:
        run_dir: the run's folder.
        keep: how many checkpoints stay; None or 0 keeps all.
        background: let training go on while rank 0 writes; the next save, `wait` and the end of
            training wait for it.
        on_failure: "warn" goes on without the checkpoint and stops after three failures in a row;
            "stop" stops at the first.

    Attributes:
        newest: the newest checkpoint of this process' life that is known to be on the disk.
        run_id: what the checkpoints name as their run; rank 0 sets it.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        keep: int | None = None,
        background: bool = False,
        on_failure: str = WARN,
    ) -> None:
        self.run_dir, self.keep = run_dir, keep
        self.background, self.on_failure = background, on_failure
        self.newest: Path | None = None
        self.run_id: str | None = None
        self._step: int | None = None  # of the save that all ranks have yet to hear of
        self._thread: threading.Thread | None = None
        self._outcome = Outcome()
        self._failures = 0
        self._blocked_s = 0.0

    def save(self, step: int, take: Callable[[bool], Snapshot | None]) -> None:
        """Save a step. A collective.

        Args:
            step: optimizer steps done.
            take: gathers the state on rank 0; a collective. Its argument asks for memory of its
                own.

        Raises:
            CheckpointError: this save, or in the background the one before, failed and the run
                stops for it; raised on every rank.
        """
        begin = time.perf_counter()
        self.wait()
        snapshot = take(self.background)
        self._step = step
        if snapshot is not None:
            self._start(snapshot)
        if not self.background:
            self.wait()
        self._blocked_s += time.perf_counter() - begin

    def wait(self) -> None:
        """Return when the last save is on the disk or has failed. A collective.

        Raises:
            CheckpointError: it failed and the run stops for it; raised on every rank.
        """
        if self._step is None:
            return
        self.join()
        step, self._step = self._step, None
        outcome = runtime.agree(self._outcome)
        if outcome.durable:
            self.newest = self.run_dir / f"checkpoint-{step}"
        if not outcome.problem:
            self._failures = 0
            return
        self._failures += 1
        self._judge(step, outcome)

    def _judge(self, step: int, outcome: Outcome) -> None:
        """Stop, or say what failed and go on."""
        what = "is saved, but" if outcome.durable else "could not be saved:"
        last = "" if self.newest is None else f" The newest good one is {self.newest.name}."
        said = f"checkpoint of step {step} {what} {outcome.problem}.{last}"
        if self.on_failure == STOP or self._failures >= MOST_FAILURES:
            raise CheckpointError(
                f"{said} Failures in a row: {self._failures}. Make room, then go on with "
                "--resume_from_checkpoint auto."
            )
        if runtime.is_main():
            count = f"{self._failures} of {MOST_FAILURES} failures in a row that are borne"
            logger.warning("warning: %s Training goes on (%s).", said, count)

    def join(self) -> None:
        """Let a write of this rank end; no collective, for a rank that leaves alone."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def take_blocked_s(self) -> float:
        """Seconds that training stood still for saving since the last call."""
        seconds, self._blocked_s = self._blocked_s, 0.0
        return seconds

    def _start(self, snapshot: Snapshot) -> None:
        """Write here what is small, and the rest here or beside training. On rank 0."""
        aside = self.run_dir / f"{store.SAVING}checkpoint-{snapshot.step}"
        self._outcome = Outcome()

        def begin() -> None:
            store.sweep(self.run_dir)
            aside.mkdir(parents=True)
            snapshot.write_small(aside)

        if not self._try(begin, aside):
            return
        if self.background:
            self._thread = threading.Thread(
                target=self._finish, args=(snapshot, aside), name="checkpoint writer"
            )
            self._thread.start()
        else:
            self._finish(snapshot, aside)

    def _finish(self, snapshot: Snapshot, aside: Path) -> None:
        final = self.run_dir / f"checkpoint-{snapshot.step}"

        def publish() -> None:
            snapshot.write_large(aside)
            store.write_manifest(aside, snapshot.step, run_id=self.run_id)
            store.publish(aside, final)
            store.point_to(final)

        if self._try(publish, aside):
            self._outcome.durable = True
            self._try(lambda: store.prune(self.run_dir, self.keep, newest=final), aside)

    def _try(self, write: Callable[[], None], aside: Path) -> bool:
        """Whether it went well; else the reason is kept and what was begun is removed.

        Nothing may escape: the other ranks wait for a word from this one.
        """
        try:
            write()
        except Exception as error:  # of the disk as a rule; of our own it stops the run, too
            store.discard(aside)
            self._outcome.problem = describe(error, self.run_dir)
            return False
        return True


def describe(error: Exception, folder: Path) -> str:
    """What went wrong in one line, and how much room there is."""
    said = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return said
    return f"{' '.join(said.split())} ({free / 2**20:,.0f} MiB free in {str(folder)!r})"


def check_writable(folder: Path) -> None:
    """Refuse a run's folder that cannot be written to, before anything is trained.

    Raises:
        CheckpointError: names folder and reason.
    """
    probe = folder
    while not probe.exists():
        probe = probe.parent
    name = probe / f".mm_moe-{runtime.rank()}-probe"
    try:
        name.mkdir(exist_ok=True)  # a start that was killed here left it
        (name / "file").write_text("x", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"--output_dir {str(folder)!r} cannot be written to ({error.strerror}: "
            f"{str(probe)!r}); name a folder that can."
        ) from error
    finally:
        shutil.rmtree(name, ignore_errors=True)
