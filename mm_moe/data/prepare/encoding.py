"""Columns of a patient table to numbers from -1 to 1, fitted on training rows only.

The rules are those of Flex-MoE's ADNI scripts (Yun et al., NeurIPS 2024): a column is

- numeric if its cells are numbers, with or without a `<` or `>` before them, and take more than two
  values: scaled to [-1, 1] by the smallest and largest; an empty cell gets the column's mean;
- a date if its name holds DATE or its cells are dates: five bins of equal width, one-hot;
- else categorical: one-hot of 1 and -1; an empty cell counts as the most frequent level; a column
  of 1,000 levels or more is dropped.

Where we differ: kinds, levels, ranges, means and modes come from the training rows alone, so values
outside the range are clipped and unknown levels get -1 everywhere; the mean is the column's own
(theirs is that of the first column); a column without a single training value is dropped.

The record names columns and counts, never a level or a value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

MAX_LEVELS = 1000
DATE_BINS = 5
NUMERIC, DATE, CATEGORICAL = "numeric", "date", "categorical"
NO_NUMBER = re.compile(r"[A-Za-z:\s]|(?<!^)-")  # a leading minus is a sign
EMPTY = re.compile(r"|nan|[+-]?inf(inity)?", re.IGNORECASE)  # no value in any of these
DATE_CELL = re.compile(r"^\d{4}-\d{1,2}-\d{1,2}([ T].*)?$|^\d{1,2}/\d{1,2}/\d{4}([ T].*)?$")

# N rows, D columns that come out of one


@dataclass(frozen=True)
class Column:
    """One fitted column.

    Attributes:
        name: as in the table.
        kind: numeric, date or categorical.
        low: smallest training value; of a date in days.
        high: largest training value.
        fill: what an empty cell is taken for: a mean, or a level.
        levels: of a categorical column, sorted.
    """

    name: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    fill: Any = None
    levels: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Numbers that it becomes."""
        return {NUMERIC: 1, DATE: DATE_BINS, CATEGORICAL: len(self.levels)}[self.kind]

    def encode(self, cells: pd.Series) -> np.ndarray:
        """Float32 (N, D) in [-1, 1]."""
        if self.kind == NUMERIC:
            values = numbers(cells).fillna(self.fill).to_numpy(np.float64)
            return _scaled(values, self.low, self.high)[:, None]
        if self.kind == DATE:
            days = _days(cells).fillna(self.fill).to_numpy(np.float64)
            place = (_scaled(days, self.low, self.high) + 1) / 2 * DATE_BINS
            return _one_hot(np.minimum(place.astype(int), DATE_BINS - 1), DATE_BINS)
        place_of = {level: place for place, level in enumerate(self.levels)}
        places = cells.fillna(self.fill).map(place_of).fillna(-1).to_numpy(int)
        return _one_hot(places, len(self.levels))


class TableEncoder:
    """Fitted columns of one table.

    Args:
        train: the training rows; cells are text or numbers, empty ones NaN.
        max_levels: a categorical column with as many levels is dropped.

    Attributes:
        columns: those that are kept.
        dropped: column -> why.
    """

    def __init__(self, train: pd.DataFrame, *, max_levels: int = MAX_LEVELS) -> None:
        self.columns: list[Column] = []
        self.dropped: dict[str, str] = {}
        for name in train.columns:
            fitted = fit_column(train[name], max_levels=max_levels)
            if isinstance(fitted, str):
                self.dropped[str(name)] = fitted
            else:
                self.columns.append(fitted)

    @property
    def width(self) -> int:
        """Numbers of one row."""
        return sum(column.width for column in self.columns)

    def encode(self, table: pd.DataFrame) -> np.ndarray:
        """Float32 (N, width)."""
        parts = [column.encode(table[column.name]) for column in self.columns]
        empty = np.zeros((len(table), 0), np.float32)
        return np.concatenate([empty, *parts], axis=1).astype(np.float32)

    def record(self) -> dict[str, Any]:
        """Names, kinds and widths; no level and no value."""
        return {
            "columns": [[column.name, column.kind, column.width] for column in self.columns],
            "dropped": self.dropped,
        }


def fit_column(cells: pd.Series, *, max_levels: int = MAX_LEVELS) -> Column | str:
    """A column fitted to its training cells, or why it is dropped."""
    name, known = str(cells.name), cells.dropna()
    if known.empty:
        return "no training value"
    if "DATE" in name.upper() or _all_match(known, DATE_CELL):
        days = _days(known).dropna()
        if days.empty:
            return "no date that can be read"
        return Column(name, DATE, days.min(), days.max(), days.mode().iloc[0])
    values = numbers(known)
    if values.notna().all() and values.nunique() > 2:
        return Column(name, NUMERIC, values.min(), values.max(), values.mean())
    levels = sorted(known.astype(str).unique())
    if len(levels) >= max_levels:
        return f"{max_levels:,} levels or more"
    # astype: a level is a text, also where the table holds numbers
    return Column(name, CATEGORICAL, fill=known.astype(str).mode().iloc[0], levels=tuple(levels))


def numbers(cells: pd.Series) -> pd.Series:
    """Cells as numbers, `<` and `>` taken off; NaN where a cell is none or not finite."""
    if pd.api.types.is_numeric_dtype(cells):
        values = cells.astype(float)
    else:
        text = cells.astype("string").str.strip().str.lstrip("<>").str.strip()
        plain = text.where(~text.str.contains(NO_NUMBER, na=False))
        values = pd.to_numeric(plain, errors="coerce").astype(float)
    return values.where(np.isfinite(values.to_numpy(float, na_value=np.nan)))


def text_cells(table: pd.DataFrame) -> pd.DataFrame:
    """The cells as text without spaces at their ends; NaN for empty and infinite ones."""
    trimmed = table.apply(lambda cells: cells.astype("string").str.strip())
    empty = trimmed.apply(lambda cells: cells.str.fullmatch(EMPTY).fillna(True)).astype(bool)
    known = trimmed.mask(empty)
    return known.astype(object).where(known.notna(), np.nan)


def _all_match(known: pd.Series, pattern: re.Pattern[str]) -> bool:
    return bool(known.astype(str).str.match(pattern).all())


def _days(cells: pd.Series) -> pd.Series:
    """Dates as days since 1970; NaN where a cell is none."""
    when = pd.to_datetime(cells, errors="coerce", format="mixed")
    return (when - pd.Timestamp("1970-01-01")) / pd.Timedelta(days=1)


def _scaled(values_N: np.ndarray, low: float, high: float) -> np.ndarray:
    """[low, high] to [-1, 1], clipped; 0 for a constant."""
    if high <= low:
        return np.zeros(len(values_N), np.float32)
    return np.clip(2 * (values_N - low) / (high - low) - 1, -1, 1).astype(np.float32)


def _one_hot(places_N: np.ndarray, width: int) -> np.ndarray:
    """1 at the place, -1 elsewhere; a place below 0 is nowhere."""
    return np.where(np.arange(width) == places_N[:, None], 1, -1).astype(np.float32)
