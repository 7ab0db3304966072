"""Files of cells, read by ranges of rows: what a file has to offer, and which class reads it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mm_moe.data.cells.listing import Listed
from mm_moe.data.cells.rows import PLACE, VALUE, Rows
from mm_moe.errors import DataError

# what HDF5, zip, numpy and scipy raise at bytes that are not what they should be
DAMAGES = (OSError, ValueError, LookupError, TypeError, RuntimeError, ArithmeticError, MemoryError)
KINDS = ("iu", "iu", "biuf")  # of numpy: where rows begin, places of genes, values
METADATA_MARK = "_metadata_"  # {species}_counts_{k}.npz has {species}_metadata_{k} beside it


class CellStore(ABC):
    """One file of cells; nothing is kept open over a fork or a pickle.

    Attributes:
        path: the file.
        random_access: whether a range of rows can be read without reading the file from its start.
    """

    random_access = True
    checked: str | None = None  # what its values were found to be when the file was written
    full_names = False  # whether its names are ids already, with the species and the first file

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def num_rows(self) -> int:
        """Cells in the file."""
        return len(self.names)

    @property
    @abstractmethod
    def num_entries(self) -> int:
        """Values in the file that are not zero, or an upper bound."""

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

    def library(self) -> np.ndarray:
        """Sums of all cells (N,), where they were `checked`."""
        raise NotImplementedError

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
    """The rows in the types that all readers give, if they are rows of that many genes at all.

    Raises:
        DataError: they are not: the file was cut or damaged.
    """
    crow, col, val = rows
    kinds = [part.ndim == 1 and part.dtype.kind in KINDS[n] for n, part in enumerate(rows)]
    whole = all(kinds) and len(crow) == count + 1
    whole = whole and crow[0] == 0 and crow[-1] == len(col) == len(val)
    fits = whole and (np.diff(crow) >= 0).all()
    if not fits or (len(col) and not (col.min() >= 0 and col.max() < num_genes)):
        raise DataError(
            f"{path} is cut or damaged: its sparse rows do not fit its {num_genes:,} genes and "
            f"{count:,} cells; get the file again."
        )
    crow = crow.astype(np.int64, copy=False)
    return Rows(crow, col.astype(PLACE, copy=False), val.astype(VALUE, copy=False))


def open_stores(
    listing: Sequence[Listed], *, layer: str | None = None, pickles: bool = False
) -> list[CellStore]:
    """The stores that read some files, by their endings.

    Args:
        listing: the files; an `.npz` has its metadata beside it.
        layer: of an `.h5ad`: which matrix; None is X, "raw" is raw.X.
        pickles: whether metadata may be a pickle.

    Raises:
        DataError: a file that no store reads.
    """
    from mm_moe.data.cells.chunks import ChunkStore, Loaded
    from mm_moe.data.cells.h5ad import H5adStore
    from mm_moe.data.cells.tables import TableStore

    loaded = {one.species: Loaded() for one in listing}
    makers: dict[str, Callable[[Listed], CellStore]] = {
        ".h5ad": lambda one: H5adStore(one.path, layer=layer),
        ".npz": lambda one: ChunkStore(one.path, loaded=loaded[one.species], pickles=pickles),
        ".parquet": lambda one: TableStore(one.path),
    }
    for one in listing:
        if one.path.suffix not in makers:
            known = ", ".join(makers)
            raise DataError(f"{one.path} is no file of cells; take one of: {known}.")
    return [makers[one.path.suffix](one) for one in listing]
