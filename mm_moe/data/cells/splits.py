"""Which split a cell belongs to: by its file, by a column, or by the hash of its name or donor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mm_moe.data.cells.files import CellFile
from mm_moe.data.cells.listing import SPLITS
from mm_moe.data.chance import split_of
from mm_moe.errors import ConfigError, DataError

OTHER_NAMES = {"val": "validation", "valid": "validation", "dev": "validation"}


@dataclass(frozen=True)
class SplitRule:
    """How cells are dealt where their file does not say it.

    Attributes:
        dataset: name of the data set, the key of the hash.
        by: column whose cells stay together.
        column: column with names of splits.
        shares: of the splits.
        seed: of the hash.

    Raises:
        ConfigError: both columns, or shares that are none.
    """

    dataset: str
    by: str | None = None
    column: str | None = None
    shares: tuple[float, ...] = (0.8, 0.1, 0.1)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.by is not None and self.column is not None:
            raise ConfigError("give split_by or split_column, not both: each decides alone.")
        wrong = len(self.shares) != len(SPLITS) or min(self.shares) < 0
        if wrong or abs(sum(self.shares) - 1) > 1e-6 or self.shares[0] <= 0:
            raise ConfigError(
                f"shares ({list(self.shares)}) must be three numbers that sum to 1, of "
                f"{', '.join(SPLITS)}, the first one over 0."
            )

    def describe(self) -> list[Any]:
        """For a fingerprint."""
        return [self.dataset, self.by, self.column, list(self.shares), self.seed]

    def deal(self, files: Sequence[CellFile]) -> dict[str, list[tuple[int, np.ndarray]]]:
        """Split -> (file, its rows, ascending).

        Raises:
            DataError: a column that is not there, or a name in it that is none of a split.
        """
        found: dict[str, list[tuple[int, np.ndarray]]] = {split: [] for split in SPLITS}
        for number, file in enumerate(files):
            split_R = self._splits_of(file)
            for split in SPLITS:
                rows = file.kept[split_R == split]
                if len(rows):
                    found[split].append((number, rows))
        if not found["train"]:
            raise DataError("no cell is in the split 'train'; check shares and the split column.")
        return found

    def _splits_of(self, file: CellFile) -> np.ndarray:
        """The split of each kept row, as text."""
        if file.listed.split is not None:
            return np.full(len(file.kept), file.listed.split, dtype=object)
        column = self.column or self.by
        if column is None:
            return self._hashed(file.names()[file.kept])
        own = file.store.column(file.store.need_column(column))[file.kept]
        return self._named(own, file) if self.column else self._hashed(own)

    def _hashed(self, keys: np.ndarray) -> np.ndarray:
        shares = dict(zip(SPLITS, self.shares, strict=True))
        values, place = np.unique(keys, return_inverse=True)
        dealt = [
            split_of(str(v), dataset=self.dataset, shares=shares, seed=self.seed) for v in values
        ]
        return np.array(dealt, dtype=object)[place]

    def _named(self, names: np.ndarray, file: CellFile) -> np.ndarray:
        values, place = np.unique(names, return_inverse=True)
        known = [OTHER_NAMES.get(str(v).lower(), str(v).lower()) for v in values]
        for value, split in zip(values, known, strict=True):
            if split not in SPLITS:
                raise DataError(
                    f"{file.listed.path}: column {self.column!r} says {value!r}, which is none of "
                    f'{", ".join(SPLITS)}; leave such cells out with "only".'
                )
        return np.array(known, dtype=object)[place]
