"""Cells in Parquet: a row each, with lists of the genes that are not zero and of their values.

`launch/prepare_data.py cells` writes such files; a file made elsewhere needs the columns `indices`
and `values`, and names of genes in its schema (key "genes", a JSON list).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mm_moe.data.cells.rows import Rows
from mm_moe.data.cells.stores import CellStore, as_text, check_rows
from mm_moe.data.reading import reading
from mm_moe.errors import DataError

INDICES, CELL_VALUES, CELL, LIBRARY = "indices", "values", "cell", "library"
GENES, CHECKED = b"genes", b"checked"  # keys of the schema
NUMBERS = (pa.types.is_integer, pa.types.is_floating)
OWN = (INDICES, CELL_VALUES, CELL, LIBRARY)


class TableStore(CellStore):
    """One Parquet file of cells.

    Raises:
        DataError: it is cut, or no such file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._handle: pq.ParquetFile | None = None
        self._owner = 0
        self._group: tuple[int, Rows] | None = None
        schema = self._file.schema_arrow
        lacks = next(_lacks(schema), None)
        if lacks is not None:
            raise DataError(
                f"{path} is no table of cells: it lacks {lacks}; make one with "
                "`python launch/prepare_data.py cells --source FOLDER --output DIR`."
            )
        self._about = dict(schema.metadata)
        found = self._about.get(CHECKED)
        self.checked = None if found is None else found.decode()
        self.full_names = found is not None  # a file of ours keeps the whole ids of the cells

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None, "_owner": 0, "_group": None}

    @property
    def _file(self) -> pq.ParquetFile:
        if self._handle is None or self._owner != os.getpid():
            with reading(str(self.path)):
                self._handle = pq.ParquetFile(self.path)
            self._owner = os.getpid()
        return self._handle

    @cached_property
    def genes(self) -> tuple[str, ...]:
        """Names in the schema."""
        try:
            found = json.loads(self._about[GENES])
        except ValueError:
            found = None
        if not isinstance(found, list):
            raise DataError(
                f"{self.path}: the names of its genes (key 'genes' of the schema) are no JSON "
                "list; write the file again."
            )
        return tuple(map(str, found))

    @property
    def num_rows(self) -> int:
        """Cells of the file."""
        return int(self._file.metadata.num_rows)

    @property
    def num_entries(self) -> int:
        """Values of all cells."""
        about, place = self._file.metadata, self._file.schema_arrow.names.index(CELL_VALUES)
        # a column of Arrow is one of Parquet here: lists of numbers, texts and numbers
        groups = range(about.num_row_groups)
        return sum(about.row_group(k).column(place).num_values for k in groups)

    @cached_property
    def _table(self) -> pa.Table:
        columns = [n for n in self._file.schema_arrow.names if n not in (INDICES, CELL_VALUES)]
        with reading(str(self.path)):
            return self._file.read(columns=columns)

    @cached_property
    def names(self) -> np.ndarray:
        """The column `cell`, or numbers."""
        if CELL in self._table.column_names:
            return as_text(self._table[CELL].to_pandas())
        return as_text(np.arange(self.num_rows))

    @property
    def columns(self) -> tuple[str, ...]:
        """All other columns."""
        return tuple(name for name in self._table.column_names if name not in OWN)

    def column(self, name: str) -> np.ndarray:
        """One of them."""
        return as_text(self._table[self.need_column(name)].to_pandas())

    def library(self) -> np.ndarray:
        """The stored sums (N,)."""
        found = self._table[LIBRARY].to_numpy().astype(np.float64)
        if not (np.isfinite(found) & (found > 0)).all():
            raise DataError(
                f"{self.path}: the sum of a cell (column {LIBRARY!r}) is not above 0; write the "
                "file again."
            )
        return found

    @cached_property
    def _edges(self) -> np.ndarray:
        """Where each row group begins, and the end."""
        about = self._file.metadata
        sizes = [about.row_group(k).num_rows for k in range(about.num_row_groups)]
        return np.cumsum([0, *sizes])

    def read(self, begin: int, end: int) -> Rows:
        """A range of cells, out of the row groups that hold it."""
        first = int(np.searchsorted(self._edges, begin, side="right")) - 1
        last = int(np.searchsorted(self._edges, end, side="left"))
        rows = Rows.joined([self._read_group(k) for k in range(first, last)])
        places = np.arange(begin, end) - self._edges[first]
        return rows if len(places) == len(rows.crow) - 1 else rows.take(places)

    def _read_group(self, number: int) -> Rows:
        if self._group is None or self._group[0] != number:
            with reading(str(self.path)):
                table = self._file.read_row_group(number, columns=[INDICES, CELL_VALUES])
            lists = [table[name].combine_chunks() for name in (INDICES, CELL_VALUES)]
            lists = [one.chunk(0) if isinstance(one, pa.ChunkedArray) else one for one in lists]
            crow, other = (np.asarray(one.offsets, dtype=np.int64) for one in lists)
            flat = [one.flatten() for one in lists]
            whole = not any(one.null_count for one in (*lists, *flat))
            if not whole or not np.array_equal(crow - crow[0], other - other[0]):
                raise DataError(
                    f"{self.path}: a cell has an empty place, or more genes than values; write "
                    "the file again."
                )
            rows = Rows(crow - crow[0], *(one.to_numpy(zero_copy_only=False) for one in flat))
            rows = check_rows(rows, path=self.path, num_genes=len(self.genes), count=len(crow) - 1)
            if self.checked is not None and not (rows.val >= 0).all():
                raise DataError(f"{self.path} holds a value below 0; write the file again.")
            self._group = (number, rows)
        return self._group[1]


def _lacks(schema: pa.Schema) -> Iterator[str]:
    """What a file of cells has and this one has not."""
    kinds = {name: schema.field(name).type for name in set(schema.names)}
    for name, numbers in ((INDICES, (pa.types.is_integer,)), (CELL_VALUES, NUMBERS)):
        kind = kinds.get(name, pa.null())
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        if not lists or not any(fits(kind.value_type) for fits in numbers):
            what = "whole numbers" if name == INDICES else "numbers"
            yield f"a column {name!r} of lists of {what}"
    about = schema.metadata or {}
    if GENES not in about:
        yield "the names of genes in its schema"
    sums = kinds.get(LIBRARY, pa.null())
    if CHECKED in about and not any(fits(sums) for fits in NUMBERS):
        yield f"the sums of its cells (column {LIBRARY!r})"


def cells_schema(*, genes: tuple[str, ...], columns: tuple[str, ...], checked: str) -> pa.Schema:
    """The schema of a file that we write."""
    fields = [
        pa.field(CELL, pa.string()),
        pa.field(INDICES, pa.list_(pa.int32())),
        pa.field(CELL_VALUES, pa.list_(pa.float32())),
        pa.field(LIBRARY, pa.float64()),
        *(pa.field(name, pa.string()) for name in columns),
    ]
    about = {GENES: json.dumps(genes).encode(), CHECKED: checked.encode()}
    return pa.schema(fields, metadata=about)
