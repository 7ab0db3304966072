"""Pushes of a run: while it trains, at its end, and what is said about them."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from eval.card import card_of_run
from mm_moe.checkpoint.hub import PUSHED, HubTarget, PushResult
from mm_moe.checkpoint.hub_queue import PushQueue
from mm_moe.training import runtime
from mm_moe.training.hub_callback import PushOnSave


class Pushing:
    """The pushes of one run; on other ranks than the first it does nothing.

    Args:
        target: where to; None pushes nothing.
        run_dir: the folder of the run.
        strategy: "end", "every_save" or "checkpoint".
    """

    def __init__(self, target: HubTarget | None, run_dir: Path, *, strategy: str) -> None:
        self.run_dir = run_dir
        self.queue: PushQueue | None = None
        self.callbacks: list[PushOnSave] = []
        if target is None or not runtime.is_main():
            return
        self.queue = PushQueue(
            run_dir,
            target,
            prepare=self._write_card,
            with_state=strategy == "checkpoint",
        )
        if strategy != "end":
            self.callbacks.append(PushOnSave(self.queue, run_dir))

    def _write_card(self, folder: Path) -> None:
        card_of_run(self.run_dir, folder, evaluated=False)

    def close(self) -> None:
        """End what is pushed now: the run stops and is to be gone on with."""
        if self.queue is not None:
            self.queue.close()

    def finish(self) -> None:
        """Push `final/` and say in one line how it ended; the run succeeds either way."""
        if self.queue is None:
            return
        result = self.queue.finish(self.run_dir / "final", message="Finished training")
        line = result_line(result, self.queue.target.repo_id, run_dir=self.run_dir)
        print(line, file=sys.stdout if result.state == PUSHED else sys.stderr, flush=True)


def result_line(result: PushResult, repo_id: str, *, run_dir: Path) -> str:
    """How a push ended, and where that leaves the model."""
    if result.state == PUSHED:
        tries = f", {result.tries} tries" if result.tries > 1 else ""
        return f"pushed to {result.url} (commit {result.commit[:12]}, {result.files} files{tries})"
    again = f"python launch/export.py {shlex.quote(str(run_dir))} --push_to_hub {repo_id}"
    what = "was refused" if result.state == "refused" else "failed"
    return (
        f"warning: the push to {repo_id} {what}: {result.reason}. The run is done and its model is "
        f"complete in {run_dir / 'final'}; push it again with: {again}"
    )
