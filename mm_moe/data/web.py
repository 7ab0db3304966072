"""Single HTTP requests: how they are asked, and what an answer says of its body."""

from __future__ import annotations

import base64
import email.utils
import http.client
import time
import urllib.parse
import urllib.request


def is_http(place: object) -> bool:
    """Whether a place is an address of the web."""
    return isinstance(place, str) and place.lower().startswith(("http://", "https://"))


def shown_url(url: str) -> str:
    """An address for logs and records: without user, password, query and fragment.

    Of one that is none ("http://[x"), its first part alone.
    """
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return f"{url.partition(':')[0]}://..."
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def web_opener() -> urllib.request.OpenerDirector:
    """HTTP and HTTPS with the environment's proxies, and nothing else: no file:, no ftp:."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def request(url: str) -> urllib.request.Request:
    """A request whose credentials stay with the host that they are for.

    Raises:
        InvalidURL: the address is none.
    """
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise http.client.InvalidURL(str(error)) from None
    user, _, host = parts.netloc.rpartition("@")
    plain = parts._replace(netloc=host, path=urllib.parse.quote(parts.path, safe="/%:@!$&'()*+,;="))
    asked = urllib.request.Request(plain._replace(fragment="").geturl())
    asked.add_header("User-Agent", "mm-moe")
    asked.add_header("Accept-Encoding", "identity")
    if user:
        secret = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        asked.add_unredirected_header("Authorization", f"Basic {secret}")
    return asked


def is_chunked(answer: http.client.HTTPResponse) -> bool:
    """Whether the body comes in chunks, whose end cannot be mistaken."""
    return answer.headers.get("Transfer-Encoding", "").lower() == "chunked"


def length(answer: http.client.HTTPResponse) -> int | None:
    """The length that an answer tells for its body, if any."""
    told = answer.headers.get("Content-Length", "")
    return int(told) if told.isdigit() and not is_chunked(answer) else None


def retry_after_s(value: str | None) -> float:
    """Seconds that a server asks for, given as a number or as a date."""
    if not value:
        return 0.0
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0
