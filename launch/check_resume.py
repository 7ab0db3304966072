"""Where a run goes on, decided by rank 0 for all: what is checked is read once, by one process."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.checks import check_output, resume_point
from launch.cli import tell
from launch.run_lock import RunLock
from mm_moe.checkpoint import store
from mm_moe.errors import CheckpointError
from mm_moe.training import runtime
from mm_moe.training.saving import check_writable


def settle_resume(values: argparse.Namespace, lock: RunLock) -> Path | None:
    """The verified checkpoint to go on from, if any; sets `output_dir` from it. A collective.

    Rank 0 locks and tidies the run's folder, reads and checks; the others wait for its verdict.

    Raises:
        CheckpointError: nothing good to resume from, or a folder that cannot be written to.
        ConfigError: the folder holds another run, or one that is going on; either is raised on
            every rank.
    """

    def decide() -> tuple[Path | None, str | None]:
        check_writable(Path(values.output_dir or "runs"))
        if values.output_dir and Path(values.output_dir).is_dir():
            lock.take(Path(values.output_dir))
        if values.resume_from_checkpoint and values.output_dir:
            store.sweep(Path(values.output_dir))
        resume = resume_point(values, tell=tell)
        check_output(values, resume=resume)
        if values.output_dir:
            lock.take(Path(values.output_dir))
        return resume, values.output_dir

    resume, values.output_dir = runtime.from_main(decide)
    return resume


def resume_comparison(folder: Path) -> Path | None:
    """The checkpoint from which a comparison goes on, if it has a good one. A collective.

    Without one it starts anew: it is trained again in the same way.
    """

    def decide() -> Path | None:
        store.sweep(folder)
        if not store.checkpoints(folder):
            return None
        try:
            return store.find(folder, "latest", tell=tell)
        except CheckpointError as error:
            tell(f"{error} The comparison starts anew.")
            return None

    return runtime.from_main(decide)
