"""Files of cells, read by ranges of rows: what a file has to offer, and which class reads it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mm_moe.data.cells.rows import Rows
from mm_moe.errors import DataError

COUNTS_MARK, METADATA_MARK = "_counts_", "_metadata_"  # {species}_counts_{k}.npz and its metadata
ENDINGS = (".h5ad", ".npz", ".parquet")


class CellStore(ABC):
    """One file of cells; nothing is kept open over a fork or a pickle.

    Attributes:
        path: the file.
        random_access: whether a range of rows can be read without reading the file from its start.
    """

    random_access = True

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def num_rows(self) -> int:
        """Cells in the file."""
        return len(self.names)

    @property
    @abstractmethod
    def genes(self) -> tuple[str, ...]:
        """Names of the genes, in the order of the file's columns."""

    @property
    @abstractmethod
    def names(self) -> np.ndarray:
        """Names of the cells (N,), as text."""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Names of what is known of the cells beside their counts."""

    @abstractmethod
    def column(self, name: str) -> np.ndarray:
        """The labels of all cells in one column, as text (N,); "" where there is none.

        Raises:
            DataError: no such column; the message lists those that are there.
        """

    @abstractmethod
    def read(self, begin: int, end: int) -> Rows:
        """The cells `begin` to `end`.

        Raises:
            DataError: the file is damaged there.
        """

    def files(self) -> tuple[Path, ...]:
        """What the content of the store depends on."""
        return (self.path,)

    def need_column(self, name: str) -> str:
        """Return the name of a column that is there.

        Raises:
            DataError: it is not.
        """
        if name not in self.columns:
            known = ", ".join(self.columns) or "none at all"
            raise DataError(f"{self.path} has no column {name!r} of cells; it has: {known}.")
        return name

    @cached_property
    def duplicated(self) -> np.ndarray:
        """Which names stand in the file a second time: bool (N,)."""
        _, first_N = np.unique(self.names, return_index=True)
        again_N = np.ones(len(self.names), dtype=bool)
        again_N[first_N] = False
        return again_N


def as_text(values: Any) -> np.ndarray:
    """A column of any kind as text (N,), "" where there is nothing."""
    import pandas as pd

    column = pd.Series(np.asarray(values, dtype=object))
    return np.asarray(column.where(column.notna(), "").astype(str), dtype=object)


def check_rows(rows: Rows, *, path: Path, num_genes: int, count: int) -> Rows:
    """The rows, if they are compressed rows of that many genes at all.

    Raises:
        DataError: they are not: the file was cut or damaged.
    """
    crow, col, val = rows
    whole = len(crow) == count + 1 and crow[0] == 0 and crow[-1] == len(col) == len(val)
    fits = whole and (np.diff(crow) >= 0).all()
    if not fits or (len(col) and not (col.min() >= 0 and col.max() < num_genes)):
        raise DataError(
            f"{path} is cut or damaged: its sparse rows do not fit its {num_genes:,} genes and "
            f"{count:,} cells; get the file again."
        )
    return rows


def open_store(path: Path, *, layer: str | None = None) -> CellStore:
    """The store that reads a file, by its ending.

    Args:
        path: an `.h5ad`, or `{species}_counts_{k}.npz` with its metadata beside it.
        layer: of an `.h5ad`: which matrix; None is X, "raw" is raw.X.

    Raises:
        DataError: no such file, or one that no store reads.
    """
    if not path.is_file():
        raise DataError(f"there is no {path}; check data_dir and the files option.")
    if path.suffix == ".h5ad":
        from mm_moe.data.cells.h5ad import H5adStore

        return H5adStore(path, layer=layer)
    raise DataError(f"{path} is no file of cells; take one of: {', '.join(ENDINGS)}.")
