"""Chunks as CELLxGENE-census pipelines write them: counts as a sparse `.npz`, metadata beside it.

`{species}_counts_{k}.npz` is what `scipy.sparse.save_npz` writes; `{species}_metadata_{k}` has one
row for each of its rows, as `.parquet`, `.csv` or `.pkl`. Genes are named in `{species}_genes.txt`
(a line each) where that file is, else "gene_0", "gene_1", ...

An archive is compressed as a whole: a chunk is loaded when its turn comes, one for each species.
"""

from __future__ import annotations

import zipfile
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mm_moe.data.cells.listing import COUNTS_MARK
from mm_moe.data.cells.pickled_tables import read_table
from mm_moe.data.cells.rows import Rows
from mm_moe.data.cells.stores import DAMAGES, METADATA_MARK, CellStore, as_text, check_rows
from mm_moe.data.reading import reading
from mm_moe.errors import DataError

NAME_COLUMNS = ("cell_id", "soma_joinid", "barcode", "index", "Unnamed: 0", "__index_level_0__")
TABLES = (".parquet", ".csv", ".pkl")


class Loaded:
    """The one chunk of a species that is in memory."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.rows: Rows | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": None, "rows": None}


class ChunkStore(CellStore):
    """One chunk.

    Args:
        path: of its counts.
        loaded: shared by the chunks of a species.
        pickles: whether metadata may be a pickle, read by a reader that knows tables alone.

    Raises:
        DataError: a chunk that is cut, or whose metadata is missing, has another number of rows, or
            is a pickle where none may be.
    """

    random_access = False

    def __init__(self, path: Path, *, loaded: Loaded, pickles: bool = False) -> None:
        super().__init__(path)
        self._loaded, self._pickles = loaded, pickles
        with _whole(path), np.load(path, allow_pickle=False) as archive:
            kind, shape = bytes(archive["format"].item()), tuple(map(int, archive["shape"]))
            crow = archive["indptr"]
            rows, self._entries = len(crow) - 1, int(crow[-1])
        if kind != b"csr" or len(shape) != 2 or rows != shape[0]:
            raise DataError(
                f"{path} holds a {kind.decode('latin-1')} matrix of shape {shape} with {rows:,} "
                "rows; save it by rows: scipy.sparse.save_npz(path, matrix.tocsr())."
            )
        self._shape = shape
        if len(self._metadata) != shape[0]:
            raise DataError(
                f"{path} has {shape[0]:,} cells, but {self._metadata_path} has "
                f"{len(self._metadata):,} rows; one of them is cut or of another chunk."
            )

    def files(self) -> tuple[Path, ...]:
        """Counts, metadata, and names of genes where they are given."""
        genes = self._genes_path
        return (self.path, self._metadata_path, *((genes,) if genes.is_file() else ()))

    @property
    def num_rows(self) -> int:
        """Cells of the chunk."""
        return self._shape[0]

    @property
    def num_entries(self) -> int:
        """Stored values."""
        return self._entries

    @property
    def _genes_path(self) -> Path:
        species = self.path.name.partition(COUNTS_MARK)[0]
        return self.path.parent / f"{species}_genes.txt"

    @cached_property
    def genes(self) -> tuple[str, ...]:
        """The lines of `{species}_genes.txt`, or numbers."""
        if not self._genes_path.is_file():
            return tuple(f"gene_{n}" for n in range(self._shape[1]))
        with reading(str(self._genes_path)):
            lines = tuple(self._genes_path.read_text(encoding="utf-8").split())
        if len(lines) != self._shape[1]:
            raise DataError(
                f"{self._genes_path} names {len(lines):,} genes, {self.path} has "
                f"{self._shape[1]:,}; give the list of this file."
            )
        return lines

    @cached_property
    def _metadata_path(self) -> Path:
        stem = self.path.stem.replace(COUNTS_MARK, METADATA_MARK)
        for ending in TABLES:
            found = self.path.parent / f"{stem}{ending}"
            if found.is_file():
                return found
        raise DataError(
            f"{self.path} has no metadata beside it: {stem} with one of {', '.join(TABLES)}."
        )

    @cached_property
    def _metadata(self) -> Any:
        import pandas as pd

        path = self._metadata_path
        if path.suffix == ".pkl":
            if not self._pickles:
                raise DataError(
                    f"{path} is a pickle, which can run any program when it is read; turn the "
                    "chunks into Parquet once: python launch/prepare_data.py cells --source "
                    f"{path.parent} --output DIR."
                )
            return read_table(path)
        with reading(str(path)):
            if path.suffix == ".parquet":
                return pd.read_parquet(path)
            return pd.read_csv(path, dtype=str)

    @cached_property
    def names(self) -> np.ndarray:
        """A column of names, the table's own index, or numbers."""
        table = self._metadata
        for name in NAME_COLUMNS:
            if name in table.columns:
                return as_text(table[name])
        return as_text(table.index)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the metadata."""
        return tuple(map(str, self._metadata.columns))

    def column(self, name: str) -> np.ndarray:
        """One column of the metadata."""
        return as_text(self._metadata[self.need_column(name)])

    def read(self, begin: int, end: int) -> Rows:
        """A range of the chunk, which is loaded if another one was."""
        if self._loaded.path != self.path or self._loaded.rows is None:
            self._loaded.rows = None  # not two chunks at once
            self._loaded.rows, self._loaded.path = self._load(), self.path
        crow, col, val = self._loaded.rows
        first, last = crow[begin], crow[end]
        return Rows(crow[begin : end + 1] - first, col[first:last], val[first:last])

    def _load(self) -> Rows:
        with _whole(self.path), np.load(self.path, allow_pickle=False) as archive:
            rows = Rows(archive["indptr"], archive["indices"], archive["data"])
        return check_rows(rows, path=self.path, num_genes=self._shape[1], count=self._shape[0])


class _whole:
    """Turn what a cut archive raises into a DataError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (*DAMAGES, EOFError, zipfile.BadZipFile, zlib.error)):
            raise DataError(
                f"{self.path} is cut, or no sparse matrix of scipy ({type(error).__name__}); get "
                "the chunk again."
            ) from error
