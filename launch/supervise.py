"""Starts a run again when its processes died: `python launch/supervise.py -- deepspeed ...`.

For launchers that do not restart by themselves: `deepspeed` and plain `python`; `torchrun` has
`--max_restarts`. The command needs `--output_dir`; `--resume_from_checkpoint auto` is added, so
that every start goes on from the newest good checkpoint:

    python launch/supervise.py --max_restarts 10 -- \
        deepspeed launch/train.py --deepspeed ds_configs/zero2.json --output_dir RUN

A run that is done (0), refused (2), went bad in its numbers (16), was preempted (75) or interrupted
(130) is not started again, and its status is returned; neither is one without a new checkpoint in
`--max_fruitless` starts in a row. On several nodes each node runs one supervisor.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from launch.cli import run_program
from mm_moe.errors import (
    EXIT_BAD_NUMBERS,
    EXIT_PREEMPTED,
    EXIT_REFUSED,
    ConfigError,
)

FINAL = (0, EXIT_REFUSED, EXIT_BAD_NUMBERS, EXIT_PREEMPTED, 130)
LONGEST_PAUSE_S = 300.0
SAVING_S = 600.0  # that processes may take to save, once the run is asked to end
RESUME = "--resume_from_checkpoint"


def read_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The supervisor's own flags, and the command behind `--`.

    Raises:
        ConfigError: a number that cannot be.
    """
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--max_restarts", type=int, default=10, help="over the whole run")
    parser.add_argument(
        "--max_fruitless", type=int, default=3, help="starts in a row without a new checkpoint"
    )
    parser.add_argument(
        "--backoff_s", type=float, default=5.0, help="pause; doubles with each fruitless start"
    )
    options = parser.parse_args(argv[:cut])
    for flag, low in (("max_restarts", 0), ("max_fruitless", 1), ("backoff_s", 0)):
        if not getattr(options, flag) >= low:
            raise ConfigError(f"--{flag} {getattr(options, flag)} must be at least {low}.")
    return options, argv[cut + 1 :]


def flag_value(command: list[str], flag: str) -> str | None:
    """The last value of a flag in a command, written with a blank or with =."""
    value = None
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == flag:
            value = following
        elif word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return value


def restartable(command: list[str]) -> tuple[list[str], Path]:
    """The command with what makes it go on when it is started again, and the folder of its run.

    Raises:
        ConfigError: no command, no `--output_dir`, or a resume that would start from another place.
    """
    if not command:
        raise ConfigError("no command; write it behind --: launch/supervise.py -- deepspeed ...")
    folder = flag_value(command, "--output_dir")
    if not folder:
        raise ConfigError("the command needs --output_dir RUN, or a new start finds no checkpoint.")
    resume = flag_value(command, RESUME)
    if resume not in (None, "auto"):
        raise ConfigError(
            f"{RESUME} {resume} would start again from there each time; write auto, or leave it "
            "out."
        )
    return (command if resume else [*command, RESUME, "auto"]), Path(folder)


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint of a run, -1 where there is none."""
    names = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*"))
    return max((int(name.group(1)) for name in names if name), default=-1)


class Supervised:
    """One start of the command after the other, in a process group of its own.

    A signal to end goes to the whole group, because the `deepspeed` command passes none on.
    """

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.asked_to_end = threading.Event()
        self._process: subprocess.Popen | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame: object) -> None:
        self.asked_to_end.set()
        self._signal_group(number)

    def _signal_group(self, number: int) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _wait_for_group(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._group_lives() and time.monotonic() < deadline:
            time.sleep(0.2)

    def _group_lives(self) -> bool:
        """Whether a process of the group still runs; one that nobody reaps does not."""
        assert self._process is not None
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                ours = os.getpgid(process.pid) == self._process.pid
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    return True
        return False

    def run(self) -> int:
        """Start the command, wait for it, end what it left behind, and return its status."""
        self._process = subprocess.Popen(self.command, start_new_session=True)
        status = self._process.wait()
        if self.asked_to_end.is_set():
            self._wait_for_group(SAVING_S)  # `deepspeed` dies at once while its processes save
        self._signal_group(signal.SIGKILL)
        return 128 - status if status < 0 else status


def supervise(command: list[str], folder: Path, options: argparse.Namespace) -> int:
    """Run the command until it is done, or until starting again is in vain; returns its status."""
    supervised = Supervised(command)
    step, fruitless = newest_step(folder), 0
    for restarts in range(options.max_restarts + 1):
        status = supervised.run()
        if status in FINAL or supervised.asked_to_end.is_set():
            return status
        reached = newest_step(folder)
        fruitless = 0 if reached > step else fruitless + 1
        step = max(step, reached)
        say = f"supervise: ended with status {status}, newest checkpoint: {_name(step)}"
        if restarts == options.max_restarts or fruitless >= options.max_fruitless:
            break
        pause_s = min(options.backoff_s * 2**fruitless, LONGEST_PAUSE_S)
        print(f"{say}; start {restarts + 2} in {pause_s:g} s", file=sys.stderr, flush=True)
        if supervised.asked_to_end.wait(pause_s):
            return status
    why = f"no newer one in {fruitless} start(s)" if fruitless else f"{restarts} restart(s) made"
    print(f"{say}; {why}, giving up", file=sys.stderr, flush=True)
    return status


def _name(step: int) -> str:
    return f"checkpoint-{step}" if step >= 0 else "none"


def main(argv: list[str]) -> int:
    """Read the flags, then watch."""
    options, command = read_options(argv)
    return supervise(*restartable(command), options)


if __name__ == "__main__":
    run_program(main)
