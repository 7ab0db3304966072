"""Pseudonyms: what stands for a patient's identifiers in everything that the library writes.

A data set that is `private` gives its samples pseudonyms for ids, groups and mask keys, so every
log, mask table, report and checkpoint that names a sample names the pseudonym. Identifiers are
often short numbers, which anybody could hash and compare; so the hash is keyed. The key comes from
the content of the download's own files: the same data give the same pseudonyms on any machine, and
only who holds the download can compute them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

BLOCK = 1 << 20
SIZE = 8  # bytes of a pseudonym: a million patients collide with a chance of 3e-8


def content_key(paths: Iterable[Path]) -> bytes:
    """A key of 32 bytes from the contents of files that are not public.

    It is no plain checksum: those of restricted downloads are published beside them.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=32, person=b"pseudonym-key")
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
        digest.update(b"\0")
    return digest.digest()


def pseudonym(identifier: str, *, key: bytes) -> str:
    """Sixteen hexadecimal digits that stand for an identifier (BLAKE2b, keyed)."""
    return hashlib.blake2b(identifier.encode(), digest_size=SIZE, key=key).hexdigest()
