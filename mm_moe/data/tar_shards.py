"""Tar shards as rows: WebDataset's rule is that names which are equal up to a dot are one row.

A small reader in place of `tarfile`, for speed and for doubt: every length is checked against the
file's, and an archive without its end mark was cut off. What a row does not use is not read. Of a
local shard only the headers and the texts are read here; a row says where its picture lies, and the
process that uses the row reads it. So a shuffle holds no pictures, and a process does not read
those of the others.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mm_moe.data.retrying import BLOCK as REMOTE_BLOCK
from mm_moe.data.retrying import RangedFile, Remote
from mm_moe.data.web import is_http, shown_url
from mm_moe.errors import DataError

BLOCK = 512
MAX_NAME = 1 << 16  # bytes of a long name or of a member's extended header
NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")
ZEROS = bytes(BLOCK)
FILE_TYPES = (b"0", b"\0", b"7")


@dataclass(frozen=True)
class Member:
    """A file in a tar: its name, and where its bytes are."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Shard:
    """A tar file.

    Attributes:
        place: path or address.
        name: what its rows' ids begin with.
    """

    place: str
    name: str


def members(file: IO[bytes], *, size: int | None, what: str) -> Iterator[Member]:
    """The files of a tar in order; the caller may read their bytes from `file` or not.

    Args:
        file: at its start; sought forward only.
        size: its bytes, None where they are not known.
        what: its name, for errors.

    Raises:
        DataError: no tar, a damaged header, or a file that ends early.
    """
    at, name, pax_size = 0, "", None
    while True:
        file.seek(at)
        header = file.read(BLOCK)
        if header == ZEROS:
            return
        if len(header) < BLOCK:
            raise DataError(
                f"{what} is cut off: it ends at byte {at + len(header):,} without tar's end mark; "
                "fetch or write it again."
            )
        length = _length(header, what=what, at=at) if pax_size is None else pax_size
        kind, start = header[156:157], at + BLOCK
        if size is not None and start + length > size:
            raise DataError(
                f"{what} is cut off: {_name(header)!r} needs bytes up to {start + length:,}, and "
                f"it has {size:,}; fetch or write it again."
            )
        at = start + -(-length // BLOCK) * BLOCK
        if kind in (b"L", b"x"):
            if length > MAX_NAME:
                raise DataError(f"{what} has a name of {length:,} bytes; it is no tar of pairs.")
            text = file.read(length)
            if kind == b"L":
                name = text.rstrip(b"\0").decode(errors="replace")
            else:
                fields = _pax(text)
                name = fields.get("path", name)
                pax_size = int(fields["size"]) if fields.get("size", "").isdigit() else None
            continue
        if kind in FILE_TYPES:
            yield Member(name or _name(header), start, length)
        name, pax_size = "", None


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:262] == b"ustar" else b""
    return (prefix + b"/" + name if prefix else name).decode(errors="replace")


def _length(header: bytes, *, what: str, at: int) -> int:
    """A member's length, of a header whose check sum is right."""
    field = header[124:136]
    try:
        told = int(header[148:156].strip(b" \0") or b"x", 8)
        length = int.from_bytes(field[1:]) if field[0] == 0x80 else int(field.strip(b" \0"), 8)
    except ValueError:
        told = length = -1
    if told != sum(header) - sum(header[148:156]) + 8 * 32 or length < 0:
        raise DataError(
            f"{what} is no tar, or is damaged: no header at byte {at:,}; fetch or write it again "
            "(a compressed tar must be unpacked first)."
        )
    return length


def _pax(text: bytes) -> dict[str, str]:
    """The fields of an extended header: lines of "LENGTH KEY=VALUE"."""
    lines = text.decode(errors="replace").split("\n")
    parts = (line.partition(" ")[2].partition("=") for line in lines)
    return {key: value for key, _, value in parts if key}


@dataclass(frozen=True)
class RowRule:
    """Which members make a row.

    Attributes:
        images: endings of pictures, the preferred first.
        texts: endings whose content a row carries.
    """

    images: tuple[str, ...]
    texts: tuple[str, ...]


def shard_rows(
    shards: list[Shard], *, rule: RowRule, remote: Remote, tail: str = "~"
) -> Iterator[dict[str, Any]]:
    """The rows of shards, one after the other.

    A row has `id` ("SHARD/KEY"; a key that comes again gets ~2, ~3, ...), `image` (None, bytes, or
    (path, offset, size) of a local file) and `texts` (ending -> bytes). A key with none of these is
    no row.

    Args:
        shards: in order. A list, because `datasets` shuffles and splits lists.
        rule: see there.
        remote: reads addresses.
        tail: before the number of a repeated key.

    Raises:
        DataError: a shard that cannot be read, or has no row.
    """
    for shard in shards:
        seen: dict[str, int] = {}
        for key, found in _groups(shard, rule=rule, remote=remote):
            seen[key] = seen.get(key, 0) + 1
            number = "" if seen[key] == 1 else f"{tail}{seen[key]}"
            yield {"id": f"{shard.name}/{key}{number}", **found}
        if not seen:
            raise DataError(
                f"{shown(shard.place)} holds no pair: no member KEY.EXT with EXT one of "
                f"{', '.join((*rule.images, *rule.texts))}; name your endings with the options "
                "images and text, or leave the file out."
            )


def _groups(shard: Shard, *, rule: RowRule, remote: Remote) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, picture and texts) of the members that follow each other and share their key."""
    wanted = {*rule.images, *rule.texts}
    with opened(shard.place, remote) as (file, size):
        is_local = not is_http(shard.place)
        key, parts = "", dict[str, Any]()
        for member in members(file, size=size, what=shown(shard.place)):
            split = NAME.fullmatch(member.name)
            if split is None:
                continue
            own, ending = split[1], split[2].lower()
            if own != key or ending in parts:
                if parts:
                    yield key, _row(parts, rule)
                key, parts = own, {}
            if ending not in wanted:
                continue
            if ending in rule.images and is_local:
                parts[ending] = (shard.place, member.offset, member.size)
            else:
                parts[ending] = file.read(member.size)
        if parts:
            yield key, _row(parts, rule)


def _row(parts: dict[str, Any], rule: RowRule) -> dict[str, Any]:
    image = next((parts[ending] for ending in rule.images if ending in parts), None)
    return {"image": image, "texts": {e: parts[e] for e in rule.texts if e in parts}}


@contextlib.contextmanager
def opened(place: str, remote: Remote) -> Iterator[tuple[IO[bytes], int | None]]:
    """A shard and its length, if that is known."""
    if is_http(place):
        about = remote.about(place)
        if about.has_ranges:  # in large blocks: a tar is read from end to end
            with io.BufferedReader(RangedFile(remote, place, about), REMOTE_BLOCK) as file:
                yield file, about.size
        else:
            with remote.open(place) as whole:
                yield whole, about.size
    else:
        # a block of its own for each header would be read and thrown away with each picture
        with open(place, "rb", buffering=4096) as local:
            yield local, Path(place).stat().st_size


def read_part(place: tuple[str, int, int]) -> bytes:
    """The bytes at (path, offset, size) of a local file.

    Raises:
        DataError: the file is shorter than it was.
    """
    path, offset, size = place
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) != size:
        raise DataError(f"{path} changed while it was read; run again on files that stay.")
    return content


def shown(place: str) -> str:
    """A place for messages: of an address nothing secret."""
    return shown_url(place) if is_http(place) else place
