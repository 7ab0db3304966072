"""Real runs on two processes whose rank 0 cannot write, or writes beside training."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.distributed.deaths import command, differing
from tests.distributed.harness import run_distributed
from tests.distributed.runs import train_here

pytestmark = [pytest.mark.distributed, pytest.mark.faults]
SHORT = ("--final_evaluation", "false", "--max_steps", "4", "--save_steps", "1")


def train_on_a_full_disk(
    rank: int, world_size: int, argv: list[str], failing: list[int]
) -> str | None:
    """The error that ends a run whose saves of some steps find no room, if one does."""
    from mm_moe.checkpoint import store
    from mm_moe.errors import CheckpointError

    inner = store.write_manifest

    def full(folder: Path, step: int, **more) -> None:
        if step in failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        inner(folder, step, **more)

    if rank == 0:
        store.write_manifest = full
    try:
        train_here(rank, world_size, [argv])
    except CheckpointError as error:
        return str(error)
    finally:
        store.write_manifest = inner
    return None


def train_three_times(rank: int, world_size: int, sync, beside, warned, stopped) -> list:
    train_here(rank, world_size, [sync, beside])
    said = train_on_a_full_disk(rank, world_size, warned, [1, 2])
    return [said, train_on_a_full_disk(rank, world_size, stopped, [2])]


def test_all_ranks_go_on_or_stop_together_and_beside_training_writes_the_same(tmp_path):
    sync, beside, warned, stopped = (tmp_path / name for name in ("s", "b", "w", "x"))
    results = run_distributed(
        train_three_times,
        2,
        command(sync, *SHORT),
        command(beside, *SHORT, "--async_save", "true"),
        command(warned, *SHORT),
        command(stopped, *SHORT, "--async_save", "true", "--on_save_failure", "stop"),
        timeout_s=400,
    )
    assert differing(sync, beside) == []
    assert differing(sync, warned) == []
    assert [said for said, _ in results] == [None, None]
    for _, said in results:  # of both ranks
        assert said is not None
        assert "step 2 could not be saved: OSError" in said
        assert "newest good one is checkpoint-1" in said
    assert sorted(path.name for path in stopped.glob("*checkpoint-*")) == ["checkpoint-1"]
