"""Columns of a table to one vector per row, with all statistics from the training rows.

A numeric column gets mean 0 and spread 1 over the training rows; a categorical one becomes one
column of zeros and ones for each level that training has. What is not known stays NaN, in every
column of its variable, so that an encoder can tell it from a zero.

N rows, D columns of the vector.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mm_moe.errors import DataError

NUMERIC, CATEGORICAL = "numeric", "categorical"
MAX_LEVELS = 200


@dataclass
class TableEncoder:
    """Turns columns into vectors; fitted once, on training rows.

    Attributes:
        kinds: column -> numeric or categorical, in the order of the vector.
        moments: numeric column -> its mean and spread.
        levels: categorical column -> its levels, sorted.
        unseen: column -> cells met with a level that training does not have; they are zeros.
    """

    kinds: Mapping[str, str]
    moments: dict[str, tuple[float, float]] = field(default_factory=dict)
    levels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unseen: dict[str, int] = field(default_factory=dict)

    def fit(self, columns: Mapping[str, np.ndarray], train_N: np.ndarray) -> TableEncoder:
        """Take statistics of the training rows.

        Args:
            columns: name -> values (N,): floats with NaN, or texts with None.
            train_N: which rows are of training.

        Raises:
            DataError: a categorical column with too many levels.
        """
        for name, kind in self.kinds.items():
            values = columns[name][train_N]
            if kind == NUMERIC:
                self.moments[name] = moments(values)
                continue
            found = tuple(sorted({str(value) for value in values if value is not None}))
            if len(found) > MAX_LEVELS:
                raise DataError(
                    f"column {name!r} has {len(found):,} levels, more than {MAX_LEVELS}; is it a "
                    "number (kind numeric), a text, or an id?"
                )
            self.levels[name] = found
        return self

    @property
    def names(self) -> list[str]:
        """What each of the D columns is."""
        parts = [
            [name] if kind == NUMERIC else [f"{name}={level}" for level in self.levels[name]]
            for name, kind in self.kinds.items()
        ]
        return list(itertools.chain.from_iterable(parts))

    def encode(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Float32 (N, D)."""
        parts = [
            self._numeric(name, columns[name])
            if kind == NUMERIC
            else self._one_hot(name, columns[name])
            for name, kind in self.kinds.items()
        ]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def _numeric(self, name: str, values_N: np.ndarray) -> np.ndarray:
        mean, spread = self.moments[name]
        return ((values_N.astype(np.float64) - mean) / spread)[:, None]

    def _one_hot(self, name: str, values_N: np.ndarray) -> np.ndarray:
        levels = self.levels[name]
        place_of = {level: place for place, level in enumerate(levels)}
        found_ND = np.zeros((len(values_N), len(levels)))
        for row, value in enumerate(values_N):
            if value is None:
                found_ND[row] = np.nan
            elif str(value) in place_of:
                found_ND[row, place_of[str(value)]] = 1.0
            else:
                self.unseen[name] = self.unseen.get(name, 0) + 1
        return found_ND


def moments(values_N: np.ndarray) -> tuple[float, float]:
    """Mean and spread of what is known; (0, 1) of nothing, spread 1 of a constant."""
    known = values_N[~np.isnan(values_N.astype(np.float64))].astype(np.float64)
    if not len(known):
        return 0.0, 1.0
    mean, spread = float(known.mean()), float(known.std())
    return mean, spread if spread > 1e-6 * max(abs(mean), 1.0) else 1.0


def standardised(values_ND: np.ndarray, train_N: np.ndarray) -> np.ndarray:
    """A matrix with each column at mean 0 and spread 1 over the training rows; NaN stays."""
    known = values_ND[train_N].astype(np.float64)
    seen_D = (~np.isnan(known)).sum(0)
    mean_D = np.nansum(known, 0) / np.maximum(seen_D, 1)
    spread_D = np.sqrt(np.nansum(np.square(known - mean_D), 0) / np.maximum(seen_D, 1))
    flat_D = spread_D <= 1e-6 * np.maximum(np.abs(mean_D), 1.0)
    return ((values_ND - mean_D) / np.where(flat_D, 1.0, spread_D)).astype(np.float32)


def plain_numbers(cells: Sequence[Any]) -> np.ndarray:
    """Float64 (N,): cells as finite numbers, NaN for what is none."""
    found = np.full(len(cells), np.nan)
    for row, cell in enumerate(cells):
        try:
            found[row] = float(cell)
        except (TypeError, ValueError):
            continue
    return np.where(np.isfinite(found), found, np.nan)
