"""A small HTTP server that fails a share of its requests, each time in another way."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("busy", "retry_after", "hang", "reset", "cut", "short_length", "drip", "bad_range")
HANG_S = 30.0  # far longer than any timeout of a test


class FlakyServer(ThreadingHTTPServer):
    """Serves the files of a folder.

    Attributes:
        share: of the requests that fail.
        faults: the ways to fail.
        has_ranges: whether it honours Range.
        tells_length: whether it sends a Content-Length.
        status: path -> a status that is answered always.
        asked: path -> requests.
        failed: fault -> times.
        sent: bytes of bodies.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path, *, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.folder = folder
        self.share, self.faults = 0.0, FAULTS
        self.has_ranges = self.tells_length = True
        self.status: dict[str, int] = {}
        self.asked: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.headers_seen: list[dict[str, str]] = []
        self.sent = 0
        self.closing = threading.Event()
        self._chance, self._lock = random.Random(0), threading.Lock()

    @property
    def url(self) -> str:
        """Its address, without a slash at the end."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self, path: str) -> str | None:
        """How this request fails, if it does."""
        with self._lock:
            self.asked[path] += 1
            if self._chance.random() >= self.share:
                return None
            fault = self._chance.choice(self.faults)
            self.failed[fault] += 1
            return fault

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: FlakyServer

    def log_message(self, *words) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.headers_seen.append(dict(self.headers))
        fault = self.server.fault(path)
        file = self.server.folder / path.lstrip("/")
        status = self.server.status.get(path) or (200 if file.is_file() else 404)
        if fault in ("busy", "retry_after"):
            extra = {"Retry-After": "0"} if fault == "retry_after" else {}
            self._answer(503, b"", extra)
        elif fault == "hang":
            self.server.closing.wait(HANG_S)
            self.close_connection = True
        elif fault == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            self.close_connection = True
        elif status != 200:
            self._answer(status, b"", {})
        else:
            self._serve(file.read_bytes(), fault)

    def _serve(self, whole: bytes, fault: str | None) -> None:
        asked = self.headers.get("Range")
        status, body, extra = 200, whole, {"ETag": f'"{len(whole)}"'}
        if asked and self.server.has_ranges:
            first, last = (int(part) for part in asked.removeprefix("bytes=").split("-"))
            if first >= len(whole):
                return self._answer(416, b"", {"Content-Range": f"bytes */{len(whole)}"})
            if fault == "bad_range":
                first += 1
            status, body = 206, whole[first : last + 1]
            last = first + len(body) - 1
            extra["Content-Range"] = f"bytes {first}-{last}/{len(whole)}"
        return self._answer(status, body, extra, fault)

    def _answer(self, status: int, body: bytes, extra: dict, fault: str | None = None) -> None:
        half = body[: len(body) // 2]
        self.send_response(status)
        for name, value in extra.items():
            self.send_header(name, value)
        if self.server.tells_length:
            self.send_header("Content-Length", str(len(half if fault == "short_length" else body)))
        self.end_headers()
        self.close_connection = True
        if fault == "drip":
            for byte in body[:-1]:
                if self.server.closing.wait(0.05):
                    return
                self.wfile.write(bytes([byte]))
        else:
            self.wfile.write(half if fault in ("cut", "short_length") else body)
        self.server.sent += len(body)


@contextmanager
def serving(folder: Path, *, port: int = 0) -> Iterator[FlakyServer]:
    """A server of a folder, until the block ends; port 0 takes a free one."""
    server = FlakyServer(folder, port=port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
        time.sleep(0)
