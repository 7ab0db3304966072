"""Offers each saved checkpoint to the queue of pushes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from mm_moe.checkpoint import store
from mm_moe.checkpoint.hub_queue import PushQueue


class PushOnSave(TrainerCallback):
    """After each save: offers the newest published checkpoint that was not offered yet.

    A checkpoint that is still being written is not published; the next save, or the end of the run,
    brings what it would have brought.
    """

    def __init__(self, queue: PushQueue, run_dir: Path) -> None:
        self.queue, self.run_dir = queue, run_dir
        self._offered = -1

    def on_save(self, args, state, control, **kwargs: Any) -> None:
        """Offer the newest one; collects hard links, and waits for nothing."""
        found = store.checkpoints(self.run_dir)
        if not state.is_world_process_zero or not found:
            return
        step = int(found[-1].name.split("-")[1])
        if step > self._offered:
            self._offered = step
            self.queue.offer(found[-1], step=step)
