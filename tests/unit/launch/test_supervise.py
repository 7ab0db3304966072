"""The supervisor starts again what died, within limits; children are small scripts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.supervise import main, newest_step, restartable
from mm_moe.errors import ConfigError

# Each start appends a line; makes checkpoint-N for N starts if told to; ends as its list says.
CHILD = """
import os, pathlib, signal, sys
run = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
starts = run / "starts"
with starts.open("a") as stream:
    stream.write(" ".join(sys.argv[1:]) + "\\n")
count = len(starts.read_text().splitlines())
if "--saves" in sys.argv:
    (run / f"checkpoint-{count}").mkdir()
ends = sys.argv[1].split(",")
end = ends[min(count, len(ends)) - 1]
if end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(end))
"""


# Saves for a second when it is asked to end.
SAVING = """
import pathlib, signal, sys, time

def save(*_):
    time.sleep(1)
    pathlib.Path(sys.argv[1]).touch()
    sys.exit(75)

signal.signal(signal.SIGUSR1, save)
pathlib.Path(sys.argv[2]).touch()
while True:
    time.sleep(0.1)
"""


def supervised(tmp_path, ends, *flags, saves=False):
    """Status of the supervisor, and the child's starts."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    command = [sys.executable, str(script), ends, "--output_dir", str(tmp_path)]
    status = main(["--backoff_s", "0.01", *flags, "--", *command, *["--saves"] * saves])
    return status, (tmp_path / "starts").read_text().splitlines()


SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture(autouse=True)
def handlers():
    """What the supervisor changes in this process is put back."""
    kept = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_processes_that_outlive_their_launcher_may_save(tmp_path):
    """As the `deepspeed` command: it dies of a signal at once, its processes save first."""
    script, saved, ready = (tmp_path / name for name in ("rank.py", "saved", "ready"))
    script.write_text(SAVING)
    words = [str(script), str(saved), str(ready)]
    launcher = f"import subprocess, sys; subprocess.call([sys.executable, *{words!r}])"
    command = [sys.executable, "-c", launcher, "--output_dir", str(tmp_path)]
    program = [sys.executable, "-m", "launch.supervise", "--", *command]
    process = subprocess.Popen(program, cwd=Path(__file__).parents[3])
    try:
        while not ready.exists():
            time.sleep(0.1)
        process.send_signal(signal.SIGUSR1)
        process.wait(60)
    finally:
        process.kill()
    assert saved.exists()


def test_a_killed_run_is_started_until_it_is_done(tmp_path):
    status, starts = supervised(tmp_path, "kill,17,1,0", saves=True)
    assert status == 0
    assert len(starts) == 4
    assert all("--resume_from_checkpoint auto" in start for start in starts)


@pytest.mark.parametrize("end", [0, 2, 16, 75, 130])
def test_some_ends_are_final(tmp_path, end):
    status, starts = supervised(tmp_path, f"{end},0")
    assert (status, len(starts)) == (end, 1)


def test_the_number_of_restarts_is_bounded(tmp_path, capsys):
    status, starts = supervised(tmp_path, "17", "--max_restarts", "4", saves=True)
    assert (status, len(starts)) == (17, 5)
    assert (
        "newest checkpoint: checkpoint-5; 4 restart(s) made, giving up" in capsys.readouterr().err
    )


def test_a_run_that_gets_nowhere_is_given_up(tmp_path, capsys):
    status, starts = supervised(tmp_path, "kill", "--max_fruitless", "2")
    assert (status, len(starts)) == (128 + signal.SIGKILL, 2)
    assert "no newer one in 2 start(s), giving up" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([], "no command"),
        (["--", "deepspeed", "launch/train.py"], "--output_dir"),
        (["--", "x", "--output_dir", "r", "--resume_from_checkpoint=latest"], "latest"),
        (["--max_fruitless", "0", "--", "x"], "--max_fruitless 0"),
    ],
)
def test_what_cannot_work_is_refused(argv, part):
    with pytest.raises(ConfigError, match=part):
        main(argv)


def test_auto_is_not_added_twice():
    command = ["x", "--output_dir=r", "--resume_from_checkpoint", "auto"]
    assert restartable(command) == (command, Path("r"))
    with pytest.raises(ConfigError):
        restartable(["x", "--output_dir"])


def test_the_newest_checkpoint_is_the_one_with_the_largest_number(tmp_path):
    assert newest_step(tmp_path / "none") == -1
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", ".saving-checkpoint-11"):
        (tmp_path / name).mkdir()
    assert newest_step(tmp_path) == 10


def test_a_signal_ends_the_whole_group_and_no_new_start_follows(tmp_path):
    child = "import os, subprocess, sys, time\n"
    child += "inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    child += f"open({str(tmp_path / 'inner')!r}, 'w').write(str(inner.pid) + '\\n')\n"
    child += "inner.wait(); sys.exit(1)\n"
    script = [sys.executable, "-m", "launch.supervise", "--"]
    script += [sys.executable, "-c", child, "--output_dir", str(tmp_path)]
    root = Path(__file__).parents[3]
    process = subprocess.Popen(script, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    marker, deadline = tmp_path / "inner", time.monotonic() + 60
    while not marker.exists() or not marker.read_text().endswith("\n"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    inner = Path("/proc", marker.read_text().strip(), "stat")
    while inner.exists() and inner.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)
