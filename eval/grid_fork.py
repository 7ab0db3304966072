"""Programs started from a process that has imported the libraries already.

Importing costs ten seconds of a core; a grid starts two programs for each of its cells.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from typing import IO

PRELOAD = ("torch", "torch.distributed", "deepspeed", "launch.run", "launch.evaluate_run")


class ForkedProgram:
    """A Python program in a process of its own, as `subprocess.Popen` would start it.

    Args:
        script: path of the program.
        arguments: its words.
        log: open file that takes its output.
        preload: modules that the first program of all waits for, and no further one.
    """

    def __init__(
        self,
        script: str,
        arguments: list[str],
        *,
        log: IO[str],
        preload: Sequence[str] = PRELOAD,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*preload])
        self._process: BaseProcess = context.Process(
            target=_run, args=(script, arguments, log.name)
        )
        self._process.start()

    def wait(self) -> int:
        """Its status, once it has ended; negative after a signal."""
        self._process.join()
        code = self._process.exitcode
        assert code is not None  # it has ended
        return code

    def terminate(self) -> None:
        """Ask it to end."""
        self._process.terminate()


def _run(script: str, arguments: list[str], log: str) -> None:
    """Become the program: its output goes into the log, its ports and files are its own."""
    place = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(place, stream)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
