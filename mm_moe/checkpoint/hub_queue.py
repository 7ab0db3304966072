"""Pushes beside the training: a thread and a queue of one place, in which the newest model wins.

Training waits for nothing: what is offered is collected by hard links, and the upload is a process
of its own. What the Hub makes of it stands in `RUN/push.json`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_moe.checkpoint.hub import FAILED, PUSHED, HubTarget, Push, PushResult, folder_files
from mm_moe.checkpoint.hub_stage import stage

logger = logging.getLogger("mm_moe")
RECORD = "push.json"
STAGED, STAGED_STATE = ".pushing-", ".pushing-state-"
LAST_CHECKPOINT = "last-checkpoint/"
_KEPT_ENTRIES = 20


@dataclass(frozen=True)
class Offer:
    """A collected model that waits for its push."""

    step: int
    model: Path
    state: Path | None  # the whole checkpoint, where the repository is to hold it too


class PushRecord:
    """`RUN/push.json`: the newest push, and how the earlier ones ended."""

    def __init__(self, run_dir: Path, target: HubTarget) -> None:
        self.file, self.target = run_dir / RECORD, target
        self.earlier: list[dict[str, Any]] = []
        self.newest: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, AttributeError):  # none yet, or not ours
            before = json.loads(self.file.read_text())
            self.earlier = [*before.pop("earlier", []), before]

    def write(self, *, step: int | None, result: PushResult | None) -> None:
        """Note that a push begins (no result) or how it ended."""
        if self.newest and self.newest.get("state") != "pushing":
            self.earlier = [*self.earlier, self.newest][-_KEPT_ENTRIES:]
        self.newest = {"step": step, **(result.record() if result else {"state": "pushing"})}
        document = {
            "repo": self.target.repo_id,
            "revision": self.target.revision or "main",
            **self.newest,
            "earlier": self.earlier,
        }
        aside = self.file.with_suffix(".tmp")
        aside.write_text(json.dumps(document, indent=1))
        aside.replace(self.file)


class PushQueue:
    """Pushes what training offers, one at a time.

    Args:
        run_dir: the folder of the run.
        target: where to.
        prepare: writes what is made for the Hub (the card) into a collected folder.
        with_state: keep the newest checkpoint in `last-checkpoint/` of the repository too.
    """

    def __init__(
        self,
        run_dir: Path,
        target: HubTarget,
        *,
        prepare: Callable[[Path], None],
        with_state: bool = False,
    ) -> None:
        self.run_dir, self.target = run_dir, target
        self.prepare, self.with_state = prepare, with_state
        self.record = PushRecord(run_dir, target)
        self._changed = threading.Condition()
        self._waiting: Offer | None = None
        self._running: Push | None = None
        self._closed = False
        self._thread: threading.Thread | None = None
        for left in run_dir.glob(f"{STAGED}*"):  # of a run that was killed in a push
            shutil.rmtree(left, ignore_errors=True)

    def offer(self, checkpoint: Path, *, step: int) -> None:
        """Collect a published checkpoint and push it when the one before is done.

        An offer that still waits is replaced. A checkpoint that cannot be collected is passed over.
        """
        model = self.run_dir / f"{STAGED}{step}"
        state = self.run_dir / f"{STAGED_STATE}{step}" if self.with_state else None
        try:
            stage(checkpoint, model)
            if state is not None:
                stage(checkpoint, state, with_state=True)
            self.prepare(model)
        except OSError as error:
            logger.warning("the model of step %d is not pushed: %s", step, error)
            _remove(Offer(step, model, state))
            return
        with self._changed:
            if self._waiting is not None:
                _remove(self._waiting)
            self._waiting = Offer(step, model, state)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="hub", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._waiting is None and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                offer, self._waiting = self._waiting, None
                assert offer is not None
                push = self._running = self._push_of(offer)
            try:
                self._run(push, step=offer.step)
            except OSError as error:  # the disk of push.json
                logger.warning("the push of step %d could not be noted: %s", offer.step, error)
            finally:
                _remove(offer)
                with self._changed:
                    self._running = None
                    self._changed.notify_all()

    def _push_of(self, offer: Offer) -> Push:
        files = folder_files(offer.model)
        replaces = [""]
        if offer.state is not None:
            files |= folder_files(offer.state, below=LAST_CHECKPOINT)
            replaces.append(LAST_CHECKPOINT)
        return Push(files, self.target, message=f"Step {offer.step}", replaces=replaces)

    def _run(self, push: Push, *, step: int | None) -> PushResult:
        self.record.write(step=step, result=None)
        result = push.run()
        self.record.write(step=step, result=result)
        if result.state != PUSHED and step is not None and not self._closed:
            logger.warning(
                "warning: the push of step %d to %s %s: %s. Training goes on.",
                step,
                self.target.repo_id,
                "failed" if result.state == FAILED else "was refused",
                result.reason,
            )
        return result

    def idle(self, timeout_s: float) -> bool:
        """Wait until nothing is pushed and nothing waits; False: not in this time."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._waiting is None and self._running is None, timeout_s
            )

    def finish(self, folder: Path, *, message: str) -> PushResult:
        """Push the finished model in place of everything that still waits or is under way.

        Ending an upload that is under way leaves nothing half: it has not committed yet, or has.

        Args:
            folder: the finished model with its card.
            message: of the commit.
        """
        self.close()
        push = Push(folder_files(folder), self.target, message=message, replaces=[""])
        return self._run(push, step=None)

    def close(self) -> None:
        """End what is under way and forget what waits."""
        with self._changed:
            self._closed = True
            if self._waiting is not None:
                _remove(self._waiting)
                self._waiting = None
            running = self._running
            self._changed.notify_all()
        if running is not None:
            running.cancel()
        if self._thread is not None:
            self._thread.join()


def _remove(offer: Offer) -> None:
    for folder in (offer.model, offer.state):
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
