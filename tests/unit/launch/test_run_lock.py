"""Two runs in one folder: the second is refused, a dead one is not in the way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.run_lock import LOCK, RunLock
from mm_moe.errors import ConfigError

HOLDER = """\
import sys
from pathlib import Path
from launch.run_lock import RunLock
RunLock().take(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.faults
def test_a_second_run_is_refused_until_the_first_is_killed(other, tmp_path):
    with pytest.raises(ConfigError, match=rf"process {other.pid} on .*name another") as caught:
        RunLock(wait_s=0).take(tmp_path)
    assert str(tmp_path) in str(caught.value)
    other.kill()
    with RunLock(wait_s=60) as lock:
        lock.take(tmp_path)
        lock.take(tmp_path)
        assert (tmp_path / LOCK).exists()
    assert not tmp_path.exists()  # nothing was written


def test_what_was_written_stays(tmp_path):
    with RunLock() as lock:
        lock.take(tmp_path / "run")
        (tmp_path / "run" / "run.json").write_text("{}")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def none(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("launch.run_lock.fcntl.lockf", none)
    with RunLock() as lock:
        lock.take(tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_goes_while_one_waits_is_made_again(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    opened, real = [], os.open

    def removed_meanwhile(file, *args):
        opened.append(file)
        if len(opened) == 1:
            folder.rmdir()  # as the last holder does, after this one has seen the folder
        return real(file, *args)

    monkeypatch.setattr("launch.run_lock.os.open", removed_meanwhile)
    with RunLock() as lock:
        lock.take(folder)
        assert (folder / LOCK).is_file()
    assert len(opened) == 2
    assert not folder.exists()
