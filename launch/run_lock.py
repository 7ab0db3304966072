"""One process at a time trains in a run's folder.

Two of them would delete each other's half-written checkpoints and mix their lines in
`metrics.jsonl`. The lock is the system's own: it ends with the process, however that dies, and
children do not inherit it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from mm_moe.errors import ConfigError

LOCK = ".mm_moe-lock"
WAIT_S = 10.0  # a killed process needs a moment to go


class RunLock:
    """Holds the folder of a run from `take` until it is left; rank 0 uses it alone.

    On a file system without locks nothing is held and nothing is refused.

    Args:
        wait_s: how long to wait for another process to go.
    """

    def __init__(self, *, wait_s: float = WAIT_S) -> None:
        self.wait_s = wait_s
        self._file: Path | None = None
        self._descriptor = -1

    def take(self, folder: Path) -> None:
        """Lock a folder, which is made if it is not there; once is enough.

        Raises:
            ConfigError: another process holds it.
        """
        if self._file is not None:
            return
        deadline = time.monotonic() + self.wait_s
        while not self._try(folder / LOCK):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"--output_dir {str(folder)!r}: a run is going on there "
                    f"({_holder(folder / LOCK)}); wait for its end or stop it, or name another "
                    "folder."
                )
            time.sleep(0.1)

    def _try(self, file: Path) -> bool:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # its last holder has removed the empty folder meanwhile
            return False
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            return False
        except OSError:  # no locks here
            os.close(descriptor)
            with contextlib.suppress(OSError):
                file.unlink()
            self._file = file
            return True
        if not _is_still(file, descriptor):  # its last holder has removed it meanwhile
            os.close(descriptor)
            return False
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        self._file, self._descriptor = file, descriptor
        return True

    def __enter__(self) -> RunLock:
        """Nothing is held yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the folder free; one that nothing was written to goes."""
        if self._file is None or self._descriptor < 0:
            return
        with contextlib.suppress(OSError):
            self._file.unlink()
            self._file.parent.rmdir()
        os.close(self._descriptor)
        self._file, self._descriptor = None, -1


def _is_still(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(file: Path) -> str:
    """Who holds a lock, as far as it says."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")[:80] or "process unknown"
    except OSError:
        return "process unknown"
