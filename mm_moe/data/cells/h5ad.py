"""`.h5ad` files (AnnData), read by ranges of rows.

A matrix that is stored by rows (CSR), or dense, is read range by range. One that is stored by
columns (CSC) has its rows all over the file: it is read whole, once, and refused over a limit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mm_moe.data.cells.rows import Rows
from mm_moe.data.cells.stores import DAMAGES, CellStore, as_text, check_rows
from mm_moe.errors import ConfigError, DataError

CSC_LIMIT = 100_000_000  # entries of a matrix by columns that are turned in memory, about 1.6 GB
RAW = "raw"


@contextmanager
def whole(path: Path, where: str) -> Iterator[None]:
    """Turn what damaged bytes lead to into a DataError that names file and place."""
    try:
        yield
    except DAMAGES as error:
        raise DataError(
            f"{path} is cut or damaged at {where} ({type(error).__name__}); get the file again."
        ) from error


class H5adStore(CellStore):
    """One AnnData file.

    Args:
        path: the file.
        layer: which matrix: None is `X`, "raw" is `raw/X` with its own genes, else a layer.
        csc_limit: entries up to which a matrix stored by columns is turned in memory.

    Raises:
        ConfigError: anndata is not installed.
        DataError: the file is cut, or no AnnData, has no such layer, or a matrix by columns that is
            over the limit.
    """

    def __init__(self, path: Path, *, layer: str | None = None, csc_limit: int = CSC_LIMIT) -> None:
        super().__init__(path)
        self.layer = layer
        self._matrix_place = {None: "X", RAW: "raw/X"}.get(layer, f"layers/{layer}")
        self._handle: Any = None
        self._owner = 0
        self._turned: Rows | None = None
        with whole(path, self._matrix_place):
            matrix = self._matrix
            self._sparse = "data" in matrix if self._is_group(matrix) else False
            encoding = matrix.attrs.get("encoding-type", matrix.attrs.get("h5sparse_format", "csr"))
            self._by_columns = self._sparse and str(encoding).startswith("csc")
            self._check_shape(csc_limit)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None, "_owner": 0}

    @staticmethod
    def _is_group(thing: Any) -> bool:
        return not isinstance(getattr(thing, "shape", None), tuple)

    def _check_shape(self, csc_limit: int) -> None:
        rows, genes = self._shape
        if rows != len(self.names) or genes != len(self.genes):
            raise DataError(
                f"{self.path}: {self._matrix_place} is {rows:,} x {genes:,}, but the file names "
                f"{len(self.names):,} cells and {len(self.genes):,} genes; get the file again."
            )
        if self._by_columns and len(self._matrix["data"]) > csc_limit:
            raise DataError(
                f"{self.path}: {self._matrix_place} is stored by columns (CSC), with "
                f"{len(self._matrix['data']):,} entries, over the {csc_limit:,} that are turned in "
                "memory; store it by rows: `adata.X = adata.X.tocsr()`, then write it again."
            )

    @property
    def _file(self) -> Any:
        """The open file of this process: a handle does not survive a fork."""
        if self._handle is None or self._owner != os.getpid():
            try:
                import h5py
            except ImportError as error:
                raise ConfigError(
                    ".h5ad files need anndata; pip install -e '.[single_cell]'."
                ) from error
            try:
                self._handle = h5py.File(self.path, "r")
            except OSError as error:
                raise DataError(
                    f"{self.path} is cut, or no HDF5 file; get the file again."
                ) from error
            self._owner = os.getpid()
        return self._handle

    @property
    def _matrix(self) -> Any:
        if self._matrix_place not in self._file:
            known = [RAW] * (RAW in self._file) + list(self._file.get("layers", ()))
            raise DataError(
                f"{self.path} has no {self._matrix_place}; layers that it has beside X: "
                f"{', '.join(known) or 'none'}."
            )
        return self._file[self._matrix_place]

    @property
    def _shape(self) -> tuple[int, int]:
        matrix = self._matrix
        shape = matrix.shape if not self._is_group(matrix) else matrix.attrs.get("shape")
        shape = matrix.attrs.get("h5sparse_shape") if shape is None else shape
        if shape is None or len(shape) != 2:
            raise DataError(f"{self.path}: {self._matrix_place} is no matrix of cells and genes.")
        return int(shape[0]), int(shape[1])

    @property
    def num_entries(self) -> int:
        """Stored values; all of a dense matrix."""
        with whole(self.path, self._matrix_place):
            return len(self._matrix["data"]) if self._sparse else self._shape[0] * self._shape[1]

    def _table(self, place: str) -> Any:
        """A table of the file, as pandas."""
        try:
            from anndata.io import read_elem
        except ImportError as error:
            raise ConfigError(
                ".h5ad files need anndata; pip install -e '.[single_cell]'."
            ) from error
        try:
            return read_elem(self._file[place])
        except Exception as error:  # anndata wraps whatever HDF5 says
            raise DataError(
                f"{self.path}: its table {place!r} cannot be read ({type(error).__name__}); is it "
                "an AnnData file?"
            ) from error

    @cached_property
    def genes(self) -> tuple[str, ...]:
        """Index of `var`, or of `raw/var`."""
        return tuple(map(str, self._table("raw/var" if self.layer == RAW else "var").index))

    @cached_property
    def _obs(self) -> Any:
        return self._table("obs")

    @cached_property
    def names(self) -> np.ndarray:
        """Index of `obs`."""
        return as_text(self._obs.index)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of `obs`."""
        return tuple(map(str, self._obs.columns))

    def column(self, name: str) -> np.ndarray:
        """One column of `obs`."""
        with whole(self.path, f"the column {name!r}"):
            return as_text(self._obs[self.need_column(name)])

    def read(self, begin: int, end: int) -> Rows:
        """A range of cells."""
        with whole(self.path, f"the cells {begin:,} to {end:,}"):
            if self._by_columns:
                return self._turned_rows().take(np.arange(begin, end))
            if not self._sparse:
                return Rows.of_dense(np.asarray(self._matrix[begin:end], dtype=np.float32))
            first, last = int(self._crow[begin]), int(self._crow[end])
            data, indices = self._matrix["data"], self._matrix["indices"]
            if last > min(len(data), len(indices)):
                raise OSError("the arrays end before the rows do")
            rows = Rows(
                self._crow[begin : end + 1] - first,
                indices[first:last],
                data[first:last],
            )
        return check_rows(rows, path=self.path, num_genes=len(self.genes), count=end - begin)

    @cached_property
    def _crow(self) -> np.ndarray:
        """Where each row begins: int64 (N + 1,)."""
        return self._matrix["indptr"][:].astype(np.int64)

    def _turned_rows(self) -> Rows:
        """The matrix by rows."""
        if self._turned is None:
            import scipy.sparse

            parts = [self._matrix[name][:] for name in ("data", "indices", "indptr")]
            data, indices, indptr = parts
            cells, genes = self._shape
            try:  # scipy follows wrong places out of its memory
                columns = Rows(indptr, indices, data)
                check_rows(columns, path=self.path, num_genes=cells, count=genes)
            except DataError as error:  # whose words are those of rows
                raise ValueError("no compressed columns") from error
            turned = scipy.sparse.csc_matrix((data, indices, indptr), shape=(cells, genes)).tocsr()
            self._turned = Rows(
                turned.indptr.astype(np.int64),
                turned.indices.astype(np.int32),
                turned.data.astype(np.float32),
            )
        return self._turned
