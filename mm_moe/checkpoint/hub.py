"""Pushing a model to the Hugging Face Hub: one commit for each push, tried again, bounded in time.

The upload runs in a process of its own (`hub_worker`), which has three reasons. A connection that
stalls can be ended at any moment, in whichever library call it hangs. What that library logs, URLs
and all, never reaches the terminal. And the trained model's process keeps its own network settings.
The token goes to that process through its standard input: it stands in no command line or file.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from mm_moe.errors import CheckpointError, ConfigError

RETRY_WAITS_S = (1.0, 4.0, 16.0, 60.0)
TIMEOUT_S = 1800.0
CHECK_LIMIT_S = 10.0
_START_LIMIT_S = 120.0  # for the process to come up on a crowded machine
_ROOT = Path(__file__).resolve().parents[2]
_LOOKS_LIKE_A_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{8,}")

PUSHED, FAILED, REFUSED = "pushed", "failed", "refused"


@dataclass(frozen=True)
class HubTarget:
    """Where to push, and with which right.

    Attributes:
        repo_id: ORG/NAME.
        token: the right to write; never shown.
        private: of a repository that is made now; None takes the organisation's own default.
        revision: the branch; None is the main one.
        timeout_s: of one push with everything that is tried again.
        waits_s: before each further try.
    """

    repo_id: str
    token: str | None = field(default=None, repr=False)
    private: bool | None = None
    revision: str | None = None
    timeout_s: float = TIMEOUT_S
    waits_s: tuple[float, ...] = RETRY_WAITS_S


@dataclass(frozen=True)
class PushResult:
    """How a push ended.

    Attributes:
        state: "pushed", "failed" (tried until tries or time ran out) or "refused" (the Hub said
            that trying again is of no use).
        reason: of a push that did not work; "" otherwise.
        tries: how often it was tried.
        url: of the repository.
        commit: the commit that holds everything.
        files: how many files the push consists of.
        seconds: it took.
    """

    state: str
    reason: str = ""
    tries: int = 0
    url: str = ""
    commit: str = ""
    files: int = 0
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "seconds": round(self.seconds, 1)}


def scrub(text: str, token: str | None = None) -> str:
    """A text without the token, and without anything that looks like one."""
    if token:
        text = text.replace(token, "***")
    return _LOOKS_LIKE_A_TOKEN.sub("***", text)


def check_repo_id(repo_id: str) -> None:
    """Refuse a name that the Hub cannot have.

    Raises:
        ConfigError: not of the form ORG/NAME.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"{repo_id!r} is no repository name; write ORG/NAME.") from error


class Worker:
    """One call of the process that speaks with the Hub.

    Args:
        job: what it is to do, as plain JSON values.
        limit_s: seconds after which it is ended, counted from when it is ready for work.
    """

    def __init__(self, job: Mapping[str, Any], *, limit_s: float) -> None:
        self.job, self.limit_s = job, limit_s
        self.events: list[dict[str, Any]] = []
        self.late = False
        self._lock = threading.Lock()
        self._cancelled = False
        self._process: subprocess.Popen[str] | None = None

    def run(self) -> dict[str, Any]:
        """Do the job and return the last event, {} where there was none."""
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        with self._lock:
            if self._cancelled:
                return {}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mm_moe.checkpoint.hub_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "PYTHONPATH": path, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
                start_new_session=True,  # Ctrl-C ends the run, and the run's end ends the worker
            )
        process = self._process
        timer = self._timer(_START_LIMIT_S)
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps(self.job) + "\n")
                process.stdin.flush()  # stays open: its end tells the worker that we are gone
            except OSError:
                pass  # it is gone already; the missing answer says so
            for line in process.stdout:
                self.events.append(json.loads(line))
                if self.events[-1]["event"] == "ready":
                    timer.cancel()
                    timer = self._timer(self.limit_s)
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
        return self.events[-1] if self.events else {}

    def _timer(self, seconds: float) -> threading.Timer:
        timer = threading.Timer(seconds, self._too_late)
        timer.daemon = True
        timer.start()
        return timer

    def _too_late(self) -> None:
        self.late = True
        self.cancel()

    def cancel(self) -> None:
        """End it now; what was not committed is not visible on the Hub."""
        with self._lock:
            self._cancelled = True
            if self._process is not None and self._process.poll() is None:
                self._process.kill()

    @property
    def tries(self) -> int:
        """How many tries were begun."""
        return sum(event["event"] == "try" for event in self.events)

    @property
    def last_reason(self) -> str:
        """Why the newest try that failed did so."""
        reasons = [event["reason"] for event in self.events if event.get("reason")]
        return reasons[-1] if reasons else ""


@dataclass(frozen=True)
class Access:
    """What the Hub says about a token: state "known", "refused" or "unreachable"."""

    state: str
    reason: str = ""
    names: tuple[str, ...] = ()


def check_token(target: HubTarget, *, limit_s: float = CHECK_LIMIT_S) -> Access:
    """Ask the Hub whose token this is; returns after `limit_s` at the latest."""
    worker = Worker({"what": "check", "token": target.token}, limit_s=limit_s)
    last = worker.run()
    if last.get("event") != "done":
        reason = f"no answer within {limit_s:g} s" if worker.late else "the check ended early"
        return Access("unreachable", reason)
    return Access(last["state"], scrub(last["reason"], target.token), tuple(last["names"]))


class Push:
    """A push that can be cancelled.

    Args:
        files: path in the repository -> local file.
        target: where to.
        message: of the commit.
        replaces: folders of the repository whose other files go away ("" means weights of other
            shardings at the top).
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        target: HubTarget,
        *,
        message: str,
        replaces: Sequence[str] = (),
    ) -> None:
        self.target, self.num_files = target, len(files)
        job = {
            "what": "push",
            "repo_id": target.repo_id,
            "token": target.token,
            "private": target.private,
            "revision": target.revision,
            "files": {name: str(file.resolve()) for name, file in files.items()},
            "replaces": list(replaces),
            "message": message,
            "waits_s": list(target.waits_s),
        }
        self.worker = Worker(job, limit_s=target.timeout_s)

    def run(self) -> PushResult:
        """Push; never raises for anything that the Hub or the network does."""
        start = time.monotonic()
        try:
            last = self.worker.run()
        except OSError as error:  # no process can be started
            last = {"event": "done", "state": FAILED, "reason": type(error).__name__}
        if last.get("event") != "done":
            last = {"state": FAILED, "reason": self._unfinished()}
        return PushResult(
            state=last["state"],
            reason=scrub(last.get("reason", ""), self.target.token),
            tries=self.worker.tries,
            url=last.get("url", ""),
            commit=last.get("commit", ""),
            files=self.num_files,
            seconds=time.monotonic() - start,
        )

    def _unfinished(self) -> str:
        before = f" (before: {self.worker.last_reason})" if self.worker.last_reason else ""
        if self.worker.late:
            return f"not done within --hub_timeout_s {self.target.timeout_s:g}{before}"
        return f"the upload was ended{before}"

    def cancel(self) -> None:
        """End it now."""
        self.worker.cancel()


def folder_files(folder: Path, *, below: str = "") -> dict[str, Path]:
    """Every file of a folder by its path in the repository."""
    return {
        f"{below}{file.relative_to(folder).as_posix()}": file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def push(folder: Path, target: HubTarget, *, message: str = "Upload the model") -> PushResult:
    """Upload a Hugging Face folder in one commit.

    Server errors, rate limits, concurrent commits and cut connections are tried again with growing
    waits, or as long as the Hub asks; a refusal (400, 401, 403, 404, 413) is not. Until the one
    commit nothing of it is visible, however large the folder is: its large files are uploaded
    before, and nothing points to them.

    Raises:
        ConfigError: a repository name that cannot be.
        CheckpointError: the folder is empty.
    """
    check_repo_id(target.repo_id)
    files = folder_files(folder)
    if not files:
        raise CheckpointError(f"{str(folder)!r} holds no file to push; name a run's final/.")
    return Push(files, target, message=message, replaces=[""]).run()
