"""Chance as a property of the sample: keyed hashes in place of random number generators.

A draw depends on (purpose, data set, split, seed, sample id) and on nothing else, so it is the same
on any number of processes, in any order, after any resume, and on any machine.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
from collections.abc import Iterator


def draws(
    sample_id: str, *, purpose: str, dataset: str, split: str = "", seed: int = 0
) -> tuple[float, float]:
    """Two independent numbers in [0, 1) that belong to one sample.

    Args:
        sample_id: the sample's stable id.
        purpose: what the numbers decide ("missing", "split", "choice"; at most 16 bytes), so that
            the rows chosen for one purpose say nothing about those chosen for another.
        dataset: name of the data set.
        split: name of the split, or "" where the draw decides the split itself.
        seed: another seed gives another, independent draw.
    """
    # JSON keeps ("a", "bc") and ("ab", "c") apart; `person` is blake2b's own slot for a purpose.
    message = json.dumps([dataset, split, seed, sample_id]).encode()
    digest = hashlib.blake2b(message, digest_size=16, person=purpose.encode()).digest()
    # 53 bits each: the whole precision of a float below 1, so 1.0 itself cannot come out.
    first, second = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")
    return (first >> 11) / 2**53, (second >> 11) / 2**53


def numbers(key: str, *, purpose: str, dataset: str, seed: int = 0) -> Iterator[int]:
    """Endless independent numbers in [0, 2**64) that belong to a key.

    Args:
        key: what the numbers are for, such as a sample in an epoch.
        purpose: as in `draws`.
        dataset: name of the data set.
        seed: another seed gives other numbers.
    """
    message = json.dumps([dataset, seed, key]).encode()
    for block in itertools.count():
        digest = hashlib.blake2b(
            block.to_bytes(8, "big") + message, digest_size=64, person=purpose.encode()
        ).digest()
        yield from struct.unpack(">8Q", digest)


def split_of(key: str, *, dataset: str, shares: dict[str, float], seed: int = 0) -> str:
    """The split of a group of rows (`key` = what must stay together), by its share of [0, 1).

    Args:
        key: id of the group: a sample id, an emoji's code, a patient.
        dataset: name of the data set.
        shares: split -> share, in order; the last one takes the rest.
        seed: another seed gives another split.
    """
    draw, _ = draws(key, purpose="split", dataset=dataset, seed=seed)
    edge = 0.0
    for split, share in shares.items():
        edge += share
        if draw < edge:
            return split
    return split
