"""Cells of one split, block by block and window by window, read when the first one is asked for.

K blocks, W windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from mm_moe.data.cells.files import CellFile
from mm_moe.data.cells.order import pass_over, permutation
from mm_moe.data.cells.rows import Rows

BLOCK = 32  # neighbouring cells that stay together until they are in memory
LARGEST_WINDOW = 4096  # cells in memory for one species, whatever the shuffle may hold


class Place(NamedTuple):
    """Where a cell lies.

    Attributes:
        file: number of its file.
        row: its row there.
        window: the cells that are read with it.
        at: its place among those.
        epoch: passes over its species before.
    """

    file: int
    row: int
    window: Window
    at: int
    epoch: int = 0


class Window:
    """Some blocks of cells, read together in the order of their files.

    Args:
        files: all files.
        blocks: (file, rows in ascending order).
    """

    def __init__(self, files: Sequence[CellFile], blocks: Sequence[tuple[int, np.ndarray]]) -> None:
        self._files, self._blocks = files, blocks

    def places(self) -> Iterator[tuple[int, int]]:
        """(file, row) of each cell, by its place."""
        for number, rows in self._sorted():
            yield from ((number, row) for row in rows.tolist())

    def _sorted(self) -> list[tuple[int, np.ndarray]]:
        """File -> its rows, once each, ascending."""
        numbers = sorted({number for number, _ in self._blocks})
        return [
            (n, np.sort(np.concatenate([rows for number, rows in self._blocks if number == n])))
            for n in numbers
        ]

    @cached_property
    def rows(self) -> Rows:
        """The cells."""
        return Rows.joined([self._files[number].read(rows) for number, rows in self._sorted()])


class SpeciesRows:
    """The cells of one species in one split.

    Args:
        files: all files.
        rows: (file, its rows in this split, ascending), in the order of the files.
    """

    def __init__(self, files: Sequence[CellFile], rows: Sequence[tuple[int, np.ndarray]]) -> None:
        self.files = files
        self.rows = [(number, own) for number, own in rows if len(own)]

    def __len__(self) -> int:
        return sum(len(own) for _, own in self.rows)

    @cached_property
    def _blocks(self) -> list[tuple[int, np.ndarray]]:
        return [
            (number, own[begin : begin + BLOCK])
            for number, own in self.rows
            for begin in range(0, len(own), BLOCK)
        ]

    def in_order(self) -> Iterator[Place]:
        """Every cell once, as it lies."""
        size = LARGEST_WINDOW // BLOCK // 4
        for begin in range(0, len(self._blocks), size):
            window = Window(self.files, self._blocks[begin : begin + size])
            for at, (number, row) in enumerate(window.places()):
                yield Place(number, row, window, at)

    def shuffled(self, *, key: str, buffer: int, start: int) -> Iterator[Place]:
        """Cells for ever, from a number of them on; each pass has its own order."""
        number, skip = divmod(start, len(self))
        while True:
            yield from self._one_pass(number, key=f"{key}/{number}", buffer=buffer, skip=skip)
            number, skip = number + 1, 0

    def _one_pass(self, number: int, *, key: str, buffer: int, skip: int) -> Iterator[Place]:
        buffer = min(buffer, LARGEST_WINDOW)
        size_K = np.array([len(rows) for _, rows in self._blocks])
        found = pass_over(size_K, self._stages, key=key, buffer=buffer)
        first = int(np.searchsorted(found.row_W, skip, side="right")) - 1
        for w in range(first, len(found.edge_W) - 1):
            blocks = found.block_K[found.edge_W[w] : found.edge_W[w + 1]]
            window = Window(self.files, [self._blocks[k] for k in blocks])
            places = list(window.places())
            order = permutation(len(places), key=f"{key}/{w}") if buffer else np.arange(len(places))
            done = skip - int(found.row_W[w]) if w == first else 0
            for at in order[done:].tolist():
                file, row = places[at]
                yield Place(file, row, window, at, number)

    @cached_property
    def _stages(self) -> np.ndarray:
        """Which blocks are read together: a file that is read from its start is a stage."""
        whole = all(self.files[number].store.random_access for number, _ in self.rows)
        return np.array([0 if whole else number for number, _ in self._blocks])
