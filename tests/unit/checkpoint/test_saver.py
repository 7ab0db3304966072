"""A save that fails: what stands stays, what was begun goes, and the run goes on or stops."""

import errno
import json
import os
import subprocess
import threading

import pytest
import torch

from mm_moe.checkpoint import store
from mm_moe.errors import CheckpointError
from mm_moe.training import saving
from mm_moe.training.saving import Saver, check_writable
from mm_moe.training.state import Snapshot

pytestmark = pytest.mark.faults


class Model:
    """What a snapshot asks of a model."""

    def save_pretrained(self, folder, *, state_dict, max_shard_size):
        torch.save(state_dict, folder / "weights")


def snapshot(step: int, size: int = 10) -> Snapshot:
    tensors = {"w": torch.full((size,), float(step))}
    texts = {store.PROGRESS: json.dumps({"step": step})}
    return Snapshot(step, Model(), lambda folder: None, tensors, tensors, texts, [{}])


def save(saver: Saver, step: int, size: int = 10) -> None:
    saver.save(step, lambda apart: snapshot(step, size))


def full(*args, **more):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(run) -> list[str]:
    return sorted(path.name for path in run.iterdir())


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("place", ["write_manifest", "publish", "digest"])
def test_a_full_disk_leaves_what_stands(place, background, tmp_path, monkeypatch, caplog):
    saver = Saver(tmp_path, keep=1, background=background)
    save(saver, 1)
    saver.wait()
    with monkeypatch.context() as patched:
        patched.setattr(store, place, full)
        save(saver, 2)
        saver.wait()
    assert names(tmp_path) == ["checkpoint-1", "latest"]
    assert store.verify(tmp_path / "checkpoint-1") == 1
    assert "checkpoint of step 2 could not be saved: OSError" in caplog.text
    assert "No space left" in caplog.text
    assert "newest good one is checkpoint-1" in caplog.text
    save(saver, 3)
    saver.wait()
    assert names(tmp_path) == ["checkpoint-3", "latest"]
    assert saver.newest == store.find(tmp_path, "latest") == tmp_path / "checkpoint-3"


def test_three_failures_in_a_row_stop_and_one_between_does_not(tmp_path, monkeypatch):
    saver = Saver(tmp_path)
    for step, fails in enumerate([True, True, False, True, True], start=1):
        with monkeypatch.context() as patched:
            if fails:
                patched.setattr(store, "write_manifest", full)
            save(saver, step)
    monkeypatch.setattr(store, "write_manifest", full)
    with pytest.raises(CheckpointError, match=r"step 6 could not be saved.*in a row: 3") as caught:
        save(saver, 6)
    assert caught.value.exit_code == 2
    with pytest.raises(CheckpointError, match="in a row: 1"):
        save(Saver(tmp_path, on_failure="stop"), 7)
    assert names(tmp_path) == ["checkpoint-3", "latest"]


def test_a_really_full_disk(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        saver = Saver(tmp_path, on_failure="stop")
        save(saver, 1)
        with pytest.raises(CheckpointError, match=r"step 2 could not be saved.*MiB free"):
            save(saver, 2, size=1_000_000)
        assert names(tmp_path) == ["checkpoint-1", "latest"]
        assert store.find(tmp_path, "latest") == tmp_path / "checkpoint-1"
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_the_same_bytes_beside_training_and_at_once(tmp_path):
    for name, background in (("now", False), ("beside", True)):
        saver = Saver(tmp_path / name, background=background)
        save(saver, 1)
        saver.wait()
    files = [
        json.loads((tmp_path / name / "checkpoint-1" / store.MANIFEST).read_text())
        for name in ("now", "beside")
    ]
    assert files[0] == files[1]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    go, inner = threading.Event(), store.write_manifest

    def held(folder, step, **more):
        assert go.wait(60)
        inner(folder, step, **more)

    monkeypatch.setattr(store, "write_manifest", held)
    saver = Saver(tmp_path, background=True)
    save(saver, 1)  # returns, though nothing is on the disk
    assert store.checkpoints(tmp_path) == []
    go.set()
    saver.wait()
    assert names(tmp_path) == ["checkpoint-1", "latest"]
    assert saver.take_blocked_s() > 0 == saver.take_blocked_s()


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / ".mm_moe-0-probe").mkdir()  # of a start that was killed
    check_writable(tmp_path / "new" / "run")
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(saving.Path, "mkdir", full)
    with pytest.raises(CheckpointError, match="cannot be written to"):
        check_writable(tmp_path / "run")
