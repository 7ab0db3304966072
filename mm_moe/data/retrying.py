"""Bytes over HTTP from a server that fails now and then: retried, and never taken short.

A body that is cut off is an error, not a shorter file. The length of a file is believed when two
answers agree on it, and every later answer is measured against it. Reads go by ranges where the
server has them; where it has none, a file is fetched whole before its first byte is read.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import random
import re
import ssl
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from mm_moe.data.web import is_chunked, length, request, retry_after_s, shown_url, web_opener
from mm_moe.errors import ConfigError, DataError

BLOCK = 4 << 20  # bytes of one range request
DEADLINE_BYTES = 1 << 20  # a body must bring so many in `timeout_s`, or all of it
LONGEST_WAIT_S = 30.0
LONGEST_RETRY_AFTER_S = 120.0
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
GONE = (404, 410)
NO_RIGHT = "check who may read it; a password or token in it is not kept, so give it at each start"
Result = TypeVar("Result")
RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")


class RemoteError(DataError):
    """An address that cannot be read, for good or after all retries."""


class GoneError(RemoteError):
    """Nothing is there: the server says so (404, 410), or the address is none."""


class NoLengthError(RemoteError):
    """The server tells no length, so that a body that is cut off would look whole."""


class TransientError(Exception):
    """One failed request that is worth another; the text says why."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s  # what the server asks for (Retry-After)


@dataclass(frozen=True)
class About:
    """What a server says of a file: its length (None: in chunks of its own), its ETag, ranges."""

    size: int | None
    tag: str | None
    has_ranges: bool


@dataclass
class Remote:
    """Reads addresses, with bounded retries after growing waits of random length.

    The waits come from the system's random numbers: no seeded generator is touched. Copies for
    loader workers share the count.

    Attributes:
        retries: further tries of one request after the first.
        timeout_s: what a request may take to answer, and then for each MiB of its body.
        first_wait_s: before the first retry; doubled for each further one, up to 30 s.
    """

    retries: int = 8
    timeout_s: float = 60.0
    first_wait_s: float = 0.25
    # One place for each process (by its id), so that workers count without a lock.
    _counts: Tensor = field(
        default_factory=lambda: torch.zeros(4096, dtype=torch.int64).share_memory_(), repr=False
    )
    _known: dict[str, About] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise ConfigError(f"stream_retries ({self.retries}) must be at least 0.")
        if not self.timeout_s > 0:
            raise ConfigError(f"stream_timeout_s ({self.timeout_s}) must be more than 0 seconds.")

    def __deepcopy__(self, memo: dict[int, Any]) -> Remote:
        return self  # a copied data set goes on counting in the same place

    @property
    def num_retries(self) -> int:
        """Requests that were repeated, by this process and its loader workers."""
        return int(self._counts.sum())

    def read(self, url: str) -> bytes:
        """The whole body of an address.

        Raises:
            RemoteError: it cannot be read.
        """
        return self.retry(url, lambda: self._whole(url))

    def about(self, url: str) -> About:
        """Length, ETag and ranges of a file, as two answers agree on them; asked once.

        Raises:
            RemoteError: no answer, or answers that never agree.
        """
        if url not in self._known:
            answers: list[About] = []

            def ask() -> About:
                answers.append(self._probe(url))
                if answers.count(answers[-1]) < 2:
                    answers.append(second := self._probe(url))
                    if answers.count(second) < 2:
                        raise TransientError("two answers differ in the file's length")
                return answers[-1]

            self._known[url] = self.retry(url, ask)
        return self._known[url]

    @contextlib.contextmanager
    def open(self, url: str) -> Iterator[BinaryIO]:
        """A file that can be read and sought like a local one.

        Raises:
            RemoteError: here, or while it is read.
        """
        about = self.about(url)
        if about.has_ranges:
            with io.BufferedReader(RangedFile(self, url, about), buffer_size=64 << 10) as file:
                yield file
        else:
            with tempfile.TemporaryFile() as file:
                self.retry(url, lambda: self._fetch(url, file, about=about))
                file.seek(0)
                yield file

    def block(self, url: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of a file with ranges.

        Raises:
            RemoteError: they cannot be read.
        """
        return self.retry(url, lambda: self._block(url, start, stop, about=self.about(url)))

    def retry(self, url: str, attempt: Callable[[], Result]) -> Result:
        """What `attempt` returns, tried up to `retries` times more.

        Args:
            url: what is read, for the error.
            attempt: fails with an OSError, an HTTPException or a TransientError where another try
                may succeed.

        Raises:
            RemoteError: the last try failed, too.
        """
        began = time.monotonic()
        for number in range(self.retries + 1):
            try:
                return attempt()
            except TransientError as error:
                reason, asked_s = str(error), error.wait_s
            except (OSError, http.client.HTTPException) as error:
                reason, asked_s = _reason(url, error), 0.0
            if number < self.retries:
                self._counts[os.getpid() % len(self._counts)] += 1
                wait_s = min(self.first_wait_s * 2**number, LONGEST_WAIT_S)
                wait_s *= random.SystemRandom().uniform(0.5, 1.0)
                time.sleep(max(wait_s, min(asked_s, LONGEST_RETRY_AFTER_S)))
        raise RemoteError(
            f"{shown_url(url)} cannot be read: {reason}, {self.retries + 1} tries in "
            f"{time.monotonic() - began:.0f} s; look after the server, or raise --stream_retries "
            f"({self.retries}) or --stream_timeout_s ({self.timeout_s:g})."
        )

    def _whole(self, url: str) -> bytes:
        body = io.BytesIO()
        self._fetch(url, body)
        return body.getvalue()

    def _fetch(self, url: str, into: IO[bytes], about: About | None = None) -> None:
        """Write a whole body; `about`: what it must be like."""
        into.seek(0)
        into.truncate()
        with self._get(url) as answer:
            told = length(answer)
            if about is not None and (told, answer.headers.get("ETag")) != (about.size, about.tag):
                raise TransientError("not the file that it was (length or ETag differ)")
            self._body(answer, into, told)

    def _block(self, url: str, start: int, stop: int, *, about: About) -> bytes:
        with self._get(url, byte_range=(start, stop)) as answer:
            got = RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            wanted = (str(start), str(stop - 1), str(about.size))
            if answer.status != 206 or got is None or got.groups() != wanted:
                raise TransientError("the server answered with another range, or another length")
            if answer.headers.get("ETag") != about.tag:
                raise TransientError("not the file that it was (its ETag differs)")
            body = io.BytesIO()
            self._body(answer, body, stop - start)
            return body.getvalue()

    def _probe(self, url: str) -> About:
        try:
            with self._get(url, byte_range=(0, 1)) as answer:
                tag = answer.headers.get("ETag")
                if answer.status == 206:
                    got = RANGE.fullmatch(answer.headers.get("Content-Range", ""))
                    if got is None:
                        raise TransientError("a range without a Content-Range")
                    return About(int(got[3]), tag, True)
                told = length(answer)
                if told is None and not is_chunked(answer):
                    raise NoLengthError(
                        f"{shown_url(url)} cannot be streamed: its server tells no length, so a "
                        "body that is cut off would look whole; serve it with a Content-Length, or "
                        "download it."
                    )
                return About(told, tag, False)
        except _EmptyFileError:
            return About(0, None, True)

    def _get(self, url: str, byte_range: tuple[int, int] | None = None) -> http.client.HTTPResponse:
        """An answer of status 200 or 206, its body unread."""
        asked = request(url)
        if byte_range:
            asked.add_header("Range", f"bytes={byte_range[0]}-{byte_range[1] - 1}")
        try:
            return web_opener().open(asked, timeout=self.timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 416 and error.headers.get("Content-Range", "").endswith("*/0"):
                    raise _EmptyFileError from None
                if error.code in TRANSIENT or error.code == 416:
                    raise TransientError(
                        f"status {error.code}", retry_after_s(error.headers.get("Retry-After"))
                    ) from None
                is_gone = error.code in GONE
                hint = "correct the address" if is_gone else NO_RIGHT
                raise (GoneError if is_gone else RemoteError)(
                    f"{shown_url(url)} cannot be read: status {error.code} "
                    f"({http.client.responses.get(error.code, 'unknown')}), 1 try; {hint}."
                ) from None

    def _body(self, answer: http.client.HTTPResponse, into: IO[bytes], size: int | None) -> None:
        """Copy a body; too slow or not `size` bytes is an error."""
        done, mark = 0, 0
        deadline = time.monotonic() + self.timeout_s
        while piece := answer.read1(64 << 10):  # what one receive brings: a drip cannot hold us
            into.write(piece)
            done += len(piece)
            if done - mark >= DEADLINE_BYTES:
                mark, deadline = done, time.monotonic() + self.timeout_s
            elif time.monotonic() > deadline:
                raise TransientError(f"too slow: {done:,} bytes, timeout {self.timeout_s:g} s")
        if size is not None and done != size:
            raise TransientError(f"cut off: {done:,} of {size:,} bytes")


class RangedFile(io.RawIOBase):
    """A remote file read by ranges.

    Args:
        remote: what reads it.
        url: its address.
        about: with a size.
    """

    def __init__(self, remote: Remote, url: str, about: About) -> None:
        super().__init__()
        self._remote, self._url, self._size = remote, url, int(about.size or 0)
        self._at = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of any file."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def tell(self) -> int:
        """As of any file."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Up to one block."""
        count = max(0, min(len(buffer), BLOCK, self._size - self._at))
        if count:
            buffer[:count] = self._remote.block(self._url, self._at, self._at + count)
            self._at += count
        return count


class _EmptyFileError(Exception):
    """A file of zero bytes has no first byte to ask for."""


def _reason(url: str, error: Exception) -> str:
    """A transport failure in words without the address.

    Raises:
        RemoteError: one that will not pass by waiting.
    """
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, http.client.InvalidURL):
        raise GoneError(f"{shown_url(url)} is no address of the web; correct it.") from None
    if isinstance(cause, ssl.SSLCertVerificationError):
        raise RemoteError(
            f"{shown_url(url)} cannot be read: {type(cause).__name__}, 1 try; check the server's "
            "certificate."
        ) from None
    return "timed out" if isinstance(cause, TimeoutError) else type(cause).__name__
