"""The endless order of training cells: whose turn it is, and which of its cells comes next.

Everything is drawn from keys, so that it is the same on any number of processes, and found again
for any position without walking there.

S species, I positions of the line, U runs, K blocks of neighbouring rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mm_moe.data.sets.mixture import uniform_at
from mm_moe.errors import ConfigError
from mm_moe.registry import nearest

UNIFORM, PROPORTIONAL, ALTERNATING, LONGEST = "uniform", "proportional", "alternating", "longest"
SAMPLERS = (UNIFORM, PROPORTIONAL, ALTERNATING, LONGEST)


def check_sampler(sampler: str, run: int) -> None:
    """Check the settings of a sampler.

    Raises:
        ConfigError: an unknown name, or a run of no cell.
    """
    if not isinstance(sampler, str) or sampler not in SAMPLERS:
        raise ConfigError(
            f"unknown species sampler {sampler!r}; {nearest(str(sampler), list(SAMPLERS))}"
        )
    if isinstance(run, bool) or not isinstance(run, int) or run < 1:
        raise ConfigError(
            f"run ({run!r}) must be a whole number from 1: cells of one species in succession."
        )


def turns(sizes: Sequence[int], *, sampler: str, run: int, key: str) -> np.ndarray:
    """The species of each position of one epoch, in which every cell comes once: int64 (I,).

    Args:
        sizes: cells of each species.
        sampler: "uniform" draws one of the species that have cells left (CMMVAE's order);
            "proportional" draws by the cells that are left; "alternating" goes round those that
            have cells left.
        run: cells that follow one another at each draw.
        key: of the chance.
    """
    # uneven ends: the last run of a species may be shorter
    count_S = -(-np.asarray(sizes, dtype=np.int64) // run)
    species_U = np.repeat(np.arange(len(sizes)), count_S)
    number_U = np.arange(len(species_U)) - np.repeat(np.cumsum(count_S) - count_S, count_S)
    size_U = np.asarray(sizes, dtype=np.int64)[species_U]
    length_U = np.minimum(run, size_U - number_U * run)
    if sampler == ALTERNATING:
        order_U = np.lexsort((species_U, number_U))
    elif sampler == PROPORTIONAL:
        order_U = permutation(len(species_U), key=key)
    else:
        order_U = _uniform_order(count_S, key=key)
    if sampler == PROPORTIONAL:  # the runs of a species keep their own order
        return _in_order(species_U[order_U], sizes, run)
    return np.repeat(species_U[order_U], length_U[order_U])


def _in_order(species_U: np.ndarray, sizes: Sequence[int], run: int) -> np.ndarray:
    """Species by position, where the last run of each species is the shorter one."""
    length_U = np.full(len(species_U), run, dtype=np.int64)
    for species, size in enumerate(sizes):
        if size:
            last = np.flatnonzero(species_U == species)[-1]
            length_U[last] = size - (-(-size // run) - 1) * run
    return np.repeat(species_U, length_U)


def _uniform_order(count_S: np.ndarray, *, key: str) -> np.ndarray:
    """Places of runs (sorted by species) when each draw is even over the species that have any."""
    total = int(count_S.sum())
    draw_U = uniform_at(0, total, key=key)
    begin_S = np.concatenate([[0], np.cumsum(count_S)[:-1]])
    left_S = count_S.copy()
    order: list[np.ndarray] = []
    at = 0
    while at < total:
        alive = np.flatnonzero(left_S)
        chosen = alive[(draw_U[at:] * len(alive)).astype(np.int64)]
        # up to where the first species runs out
        ends = [np.flatnonzero(chosen == s) for s in alive]
        stop = min(
            int(places[left_S[s] - 1]) + 1 if len(places) >= left_S[s] else len(chosen)
            for s, places in zip(alive, ends, strict=True)
        )
        chosen = chosen[:stop]
        placed = np.empty(stop, dtype=np.int64)
        for s in alive:
            mine = chosen == s
            first = begin_S[s] + count_S[s] - left_S[s]
            placed[mine] = first + np.arange(mine.sum())
            left_S[s] -= mine.sum()
        order.append(placed)
        at += stop
    return np.concatenate(order) if order else np.empty(0, dtype=np.int64)


def species_line(
    sizes: Sequence[int], *, sampler: str, run: int, seed: int, start: int
) -> Iterator[tuple[int, int]]:
    """(species, number of its cell counted over all epochs) from position `start` on, for ever.

    "longest" goes round all species in strict turns; a species that is through begins again. The
    others go through every cell once in an epoch.
    """
    check_sampler(sampler, run)
    present = [s for s, size in enumerate(sizes) if size]
    if sampler == LONGEST:
        yield from _strict_turns(present, run=run, start=start)
    total = sum(sizes)
    for epoch in itertools.count(start // total):
        turn_I = turns(sizes, sampler=sampler, run=run, key=f"turns/{seed}/{epoch}")
        begin = start % total if epoch == start // total else 0
        done_S = np.bincount(turn_I[:begin], minlength=len(sizes)) + epoch * np.asarray(sizes)
        for s in turn_I[begin:].tolist():
            yield s, int(done_S[s])
            done_S[s] += 1


def _strict_turns(present: Sequence[int], *, run: int, start: int) -> Iterator[tuple[int, int]]:
    for position in itertools.count(start):
        number, within = divmod(position, run)
        rounds, turn = divmod(number, len(present))
        yield present[turn], rounds * run + within


def permutation(count: int, *, key: str) -> np.ndarray:
    """A permutation of `count` numbers that belongs to a key: int64 (count,)."""
    return np.argsort(uniform_at(0, count, key=key), kind="stable")


class Pass(NamedTuple):
    """One pass of a species over its cells.

    Attributes:
        block_K: blocks in the order in which they are read.
        edge_W: where each window begins among them; at the end, K.
        row_W: rows before each window; at the end, all rows.
    """

    block_K: np.ndarray
    edge_W: np.ndarray
    row_W: np.ndarray


def pass_over(size_K: np.ndarray, stage_K: np.ndarray, *, key: str, buffer: int) -> Pass:
    """Blocks in a drawn order, grouped to windows of about `buffer` rows.

    Args:
        size_K: rows of each block.
        stage_K: blocks of one stage are read before those of the next (a file that cannot be read
            at any place); which stage comes first is drawn, too.
        key: of the chance.
        buffer: rows of a window; 0 keeps the order as it is, a block a window.
    """
    if buffer:
        rank = permutation(int(stage_K.max()) + 1, key=f"{key}/stages")
        order_K = np.lexsort((uniform_at(0, len(size_K), key=key), rank[stage_K]))
    else:
        order_K = np.arange(len(size_K))
    end_K = np.cumsum(size_K[order_K])
    begin_K = end_K - size_K[order_K]
    window_K = begin_K // max(1, buffer) if buffer else np.arange(len(size_K))
    edge_W = np.flatnonzero(np.diff(window_K, prepend=-1))
    total = end_K[-1:] if len(end_K) else np.zeros(1, dtype=np.int64)
    return Pass(order_K, np.append(edge_W, len(size_K)), np.concatenate([begin_K[edge_W], total]))
