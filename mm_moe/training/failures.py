"""What broke, in one line: a lost process and exhausted memory, told from torch's own errors."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

import torch
import torch.distributed as dist

from mm_moe.errors import EXIT_LOST_RANK, LostRankError, MemoryLimitError
from mm_moe.training import runtime

# What torch says when a peer's connection closes or a collective waits too long: all of it is
# plain RuntimeError for gloo.
_PEER = re.compile(
    r"gloo/transport|Gloo \w+ failed|Connection (closed|reset) by peer|"
    r"remote process exited|ncclRemoteError|ncclSystemError|collective operation timeout|"
    r"Timed out waiting \d+ms for (recv|send)"
)
_LOADER = re.compile(r"DataLoader worker .*(killed|exited unexpectedly)")
_MEMORY = re.compile(
    r"DefaultCPUAllocator: |not enough memory|out of memory|ALLOC_FAILED|can't allocate memory"
)
CAUSE_FIRST_S = 3.0  # launchers look once a second for the first process that failed


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process is gone or does not answer."""
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and bool(_PEER.search(str(error)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_MEMORY.search(str(error)))


@contextlib.contextmanager
def told_plainly(*, plan: str) -> Iterator[None]:
    """Turn torch's errors about lost processes and memory into ours.

    Args:
        plan: the command that shows what this run needs.

    Raises:
        LostRankError: a process of the run, or one that loads data, died or does not answer.
        MemoryLimitError: memory ran out.
    """
    here = f"rank {runtime.rank()}"
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        first = str(error).strip().partition("\n")[0]
        if is_out_of_memory(error):
            raise MemoryLimitError(
                f"{here}: out of memory: {_asked(first)} See what fits: {plan}"
            ) from error
        if is_lost_peer(error):
            raise LostRankError(
                f"{here}: another process of the run died or does not answer ({_short(first)}). "
                "Its own output says why; start again with --resume_from_checkpoint auto."
            ) from error
        if _LOADER.search(first):
            raise LostRankError(
                f"{here}: a process that loads data died ({_short(first)}). Was memory short? "
                "Start again with --resume_from_checkpoint auto."
            ) from error
        raise


def _asked(message: str) -> str:
    """The sentence that says what was asked for."""
    found = re.search(r"(Tried|you tried) to allocate [^.]*(\.\d[^.]*)*\.?", message)
    return f"{found.group(0).rstrip('.')}." if found else _short(message) + "."


def _short(message: str) -> str:
    """Torch's own words without the place in its source and its advice."""
    words = re.sub(r"^\[[^\]]*\]\s*", "", message)
    return words.split(". ")[0].rstrip(".")


def leave(status: int, *, speaks_first: bool = True) -> NoReturn:
    """End this process, without waiting for peers that may be gone.

    Destructors of process groups can block or abort when a peer died; processes that load data do
    not outlive this one. The launcher ends all processes when it sees the first that failed: one
    that has said nothing, or whose peer failed first, gives the others a moment.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each of them
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if status == EXIT_LOST_RANK or not speaks_first:
        time.sleep(CAUSE_FIRST_S)
    os._exit(status)
