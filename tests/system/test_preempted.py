"""One rank of a real run on two processes is told to stop: exit status and last word."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.distributed.runs import write_recipe

pytestmark = [pytest.mark.faults, pytest.mark.slow]
LIMIT_S = 300


def rank_process(launcher: int, rank: int) -> int:
    """The process of a rank below its launcher."""
    for child in psutil.Process(launcher).children(recursive=True):
        words = child.cmdline()
        ours = any(word.endswith("launch/train.py") for word in words[1:3])
        if ours and child.environ().get("RANK") == str(rank):
            return child.pid
    raise AssertionError(f"no rank {rank} below {launcher}")


def wait_for(condition, process) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_the_status_and_the_last_word(tmp_path, launcher):
    port = str(20_000 + os.getpid() % 20_000)
    count = {"deepspeed": "--num_accelerators", "torchrun": "--nproc_per_node"}[launcher]
    metrics = tmp_path / "run" / "metrics.jsonl"
    program = os.path.join(os.path.dirname(sys.executable), launcher)
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [
                *(program, count, "2", "--master_port", port, "launch/train.py"),
                *("--config", write_recipe(tmp_path), "--output_dir", str(metrics.parent)),
                *("--max_steps", "100000", "--save_steps", "100000", "--ep_size", "2"),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, process)
            os.kill(rank_process(process.pid, 1), signal.SIGUSR1)
            status = process.wait(LIMIT_S)
        finally:
            process.terminate()
    said = (tmp_path / "log").read_text()
    assert status == {"deepspeed": 75, "torchrun": 1}[launcher], said  # torchrun has its own
    steps = metrics.read_text().count("\n")
    assert [path.name for path in metrics.parent.glob("checkpoint-*")] == [f"checkpoint-{steps}"]
    word = next(line for line in said.splitlines() if "stopped: " in line)
    assert f"SIGUSR1, replay at step {steps}. Saved checkpoint-{steps}. Go on with: " in word
    assert "Traceback" not in said.split("stopped: ")[0]
