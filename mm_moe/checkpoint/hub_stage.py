"""What of a run's folders is published: the model, and nothing that only resumes a run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mm_moe.checkpoint import store

# What resumes a run but does not belong into a published model.
RESUME_ONLY = (
    store.OPTIMIZER,
    store.SCHEDULER,
    store.TRAINER_STATE,
    store.MANIFEST,
    store.PROGRESS,
    store.RANKS,
)


def stage(source: Path, target: Path, *, with_state: bool = False, leave_out: str = "") -> None:
    """Collect a model's files in a folder of their own, without copying where links are possible.

    The folder keeps its content when the source is pruned meanwhile: training may delete a
    checkpoint while it is uploaded. Nobody may write into staged files, as they are the source's.

    Args:
        source: a checkpoint or `final/`.
        target: a new folder; a folder of that name is replaced.
        with_state: take also what resumes the run.
        leave_out: a pattern of further names that are left out.

    Raises:
        OSError: the source went away, or the disk is full.
    """
    unwanted = [] if with_state else RESUME_ONLY
    shutil.rmtree(target, ignore_errors=True)
    try:
        shutil.copytree(
            source,
            target,
            ignore=shutil.ignore_patterns(*unwanted, *filter(None, [leave_out])),
            copy_function=_link,
        )
    except (OSError, shutil.Error) as error:
        shutil.rmtree(target, ignore_errors=True)
        raise OSError(f"{str(source)!r} could not be collected") from error


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
    return target


def put(folder: Path, name: str, content: str | bytes) -> None:
    """Write a file of a staged folder anew, without touching what the old one was linked to."""
    file = folder / name
    file.unlink(missing_ok=True)
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content, encoding="utf-8")
