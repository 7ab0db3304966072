"""Supports: training rows that have what a sample lacks, drawn by keyed hash.

A sample that lacks modality m and has the modalities O is given training rows whose own
combination holds m and all of O (MoE-Retriever, section 3.1 of its method). The draw is uniform
without replacement over exactly these rows, of training alone, and the rows of the sample's own
group (its patient) never come. It is a hash of (data set, sample, modality, epoch, seed), so it is
the same on any number of processes and after any resume; its cost does not grow with the rows.

Where the release raises an error because too few rows fit, all that fit are taken; where none
fits, rows that have m and share the most with O; where no row has m, none.

N training rows, M modalities. A pattern is a set of modalities as in `mm_moe.batch`: bit m.
"""

from __future__ import annotations

import hashlib
import itertools
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mm_moe.data.chance import numbers

SMALL_POOL = 64  # rows up to which a pool is written out; a larger one is drawn from by its places
TRIES = 16  # draws for each wanted row before a pool is written out after all


def group_code(group: str) -> int:
    """A group's key as 63 bits of its hash: what an index keeps in place of the key."""
    digest = hashlib.blake2b(group.encode(), digest_size=8, person=b"group").digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class Pool:
    """Rows of some patterns, as spans of the index's order; nothing is copied.

    Attributes:
        starts: of each span.
        ends: of each span, counted within the pool: the last one is its size.
    """

    starts: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def size(self) -> int:
        """Rows of the pool."""
        return self.ends[-1]

    def place(self, number: int) -> int:
        """Place in the index's order of the pool's row `number`."""
        span = bisect_right(self.ends, number)
        before = self.ends[span - 1] if span else 0
        return self.starts[span] + number - before

    def places(self) -> np.ndarray:
        """All places, int64."""
        befores = (0, *self.ends[:-1])
        spans = zip(self.starts, befores, self.ends, strict=True)
        return np.concatenate([np.arange(s, s + end - begin) for s, begin, end in spans])


class SupportIndex:
    """Which training rows have which modalities, for draws whose cost does not grow with them.

    Args:
        pattern_N: for each row of the split, in its order, the pattern that the missing protocol
            leaves it: what was taken in training is not shown to others either.
        group_N: for each row its `group_code`.
        num_modalities: M.
    """

    def __init__(self, pattern_N: np.ndarray, group_N: np.ndarray, *, num_modalities: int) -> None:
        self.num_modalities = num_modalities
        self.pattern_N = pattern_N.astype(np.uint32)
        self.group_N = group_N.astype(np.int64)
        self._order_N = np.argsort(self.pattern_N, kind="stable").astype(np.int32)
        found, starts = np.unique(self.pattern_N[self._order_N], return_index=True)
        self._patterns = found.tolist()
        self._spans = list(itertools.pairwise([*starts.tolist(), len(self.pattern_N)]))
        self._pools: dict[tuple[int, int], list[Pool]] = {}  # at most M * 2**(M-1) keys

    def __len__(self) -> int:
        """Rows of the split."""
        return len(self.pattern_N)

    @property
    def num_bytes(self) -> int:
        """Memory of the arrays."""
        return self.pattern_N.nbytes + self.group_N.nbytes + self._order_N.nbytes

    def pools(self, own: int, modality: int) -> list[Pool]:
        """The rows that have a modality, by how much of a pattern they share, the most first.

        The first pool holds exactly the rows with all of `own`, if there are any.
        """
        if (own, modality) not in self._pools:
            shared: dict[int, list[tuple[int, int]]] = {}
            for pattern, span in zip(self._patterns, self._spans, strict=True):
                if pattern >> modality & 1:
                    shared.setdefault((pattern & own).bit_count(), []).append(span)
            self._pools[own, modality] = [_pool(shared[level]) for level in sorted(shared)[::-1]]
        return self._pools[own, modality]

    def draw(
        self, own: int, modality: int, *, count: int, stream: Iterator[int], group: int
    ) -> list[int]:
        """Rows that lend `modality` to a sample of pattern `own`.

        Args:
            own: pattern of what the sample has.
            modality: number of what it lacks.
            count: rows that are wanted.
            stream: of `chance.numbers`; the same numbers draw the same rows.
            group: `group_code` of the sample, whose rows are left out.

        Returns:
            Distinct rows of the split: `count`, or all there are of the best pool that has any.
        """
        for pool in self.pools(own, modality):
            if rows := self._draw(pool, count, stream, group):
                return rows
        return []

    def _draw(self, pool: Pool, count: int, stream: Iterator[int], group: int) -> list[int]:
        """`count` rows of one pool, uniformly, or all that are not of the group."""
        if pool.size > SMALL_POOL + 4 * count:
            found: dict[int, None] = {}
            for number in itertools.islice(stream, TRIES * count):
                row = int(self._order_N[pool.place(number * pool.size >> 64)])
                if self.group_N[row] != group:
                    found[row] = None
                if len(found) == count:
                    return list(found)
        rows = self._order_N[pool.places()]
        rest = rows[self.group_N[rows] != group].tolist()
        for place in range(min(count, len(rest) - 1)):  # the first steps of a fair shuffle
            other = place + (next(stream) * (len(rest) - place) >> 64)
            rest[place], rest[other] = rest[other], rest[place]
        return rest[:count]


def support_numbers(
    sample_id: str, *, modality: str, dataset: str, epoch: int, seed: int
) -> Iterator[int]:
    """The numbers that decide a sample's supports for one modality in one epoch."""
    key = f"{epoch}/{modality}/{sample_id}"
    return numbers(key, purpose="support", dataset=dataset, seed=seed)


def _pool(spans: list[tuple[int, int]]) -> Pool:
    sizes = itertools.accumulate(end - start for start, end in spans)
    return Pool(tuple(start for start, _ in spans), tuple(sizes))
