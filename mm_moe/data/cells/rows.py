"""Cells as sparse rows, on their way from a file to a model: packed, batched, densified.

N cells, G genes of one species, R entries that are not zero over all N cells, C columns of
conditions. Entries are kept in compressed rows (CSR): row n has the entries `crow[n]` to
`crow[n + 1]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from mm_moe.errors import ConfigError, DataError

TARGET_SUM = 1e4  # counts that a cell is scaled to before the logarithm
FORMS = ("sparse", "dense")
PLACE, VALUE = np.dtype("<i4"), np.dtype("<f4")


class Rows(NamedTuple):
    """Sparse rows in memory.

    Attributes:
        crow: int64 (N + 1,).
        col: int32 (R,), places of genes.
        val: float32 (R,).
    """

    crow: np.ndarray
    col: np.ndarray
    val: np.ndarray

    def cell(self, row: int) -> tuple[bytes, bytes]:
        """Genes and values of one row, as bytes."""
        first, last = self.crow[row], self.crow[row + 1]
        return self.col[first:last].tobytes(), self.val[first:last].tobytes()

    def take(self, places: np.ndarray) -> Rows:
        """The rows at some places, in their order."""
        length_N = np.diff(self.crow)[places]
        crow = np.concatenate([[0], np.cumsum(length_N)])
        entry_R = np.repeat(self.crow[places] - crow[:-1], length_N) + np.arange(crow[-1])
        return Rows(crow, self.col[entry_R], self.val[entry_R])

    def with_genes(self, place_G: np.ndarray) -> Rows:
        """The rows with gene g renumbered to `place_G[g]`, and without it where that is -1."""
        col = place_G[self.col]
        kept_R = col >= 0
        before_R = np.concatenate([[0], np.cumsum(kept_R)])
        return Rows(before_R[self.crow], col[kept_R].astype(PLACE), self.val[kept_R])

    def sums(self) -> np.ndarray:
        """Sum of each row: float64 (N,)."""
        total_R = np.concatenate([[0.0], np.cumsum(self.val, dtype=np.float64)])
        return total_R[self.crow[1:]] - total_R[self.crow[:-1]]

    @classmethod
    def of_dense(cls, values_NG: np.ndarray) -> Rows:
        """The entries of a matrix that are not zero (NaN is not)."""
        row_R, col_R = np.nonzero(values_NG)
        crow = np.searchsorted(row_R, np.arange(len(values_NG) + 1))
        return cls(crow.astype(np.int64), col_R.astype(PLACE), values_NG[row_R, col_R])

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """Rows one after the other."""
        if len(parts) == 1:
            return parts[0]
        ends = np.cumsum([0, *(part.crow[-1] for part in parts)])
        crow = [part.crow[:-1] + end for part, end in zip(parts, ends, strict=False)]
        return cls(
            np.concatenate([*crow, ends[-1:]]),
            np.concatenate([part.col for part in parts]),
            np.concatenate([part.val for part in parts]),
        )


class CellRow(NamedTuple):
    """One cell as a payload: small, comparable, quick to send to another process.

    Attributes:
        col: places of the genes that are not zero, as int32 bytes.
        val: their values, as float32 bytes.
        num_genes: G, of the species.
        library: the sum of the cell's values.
        conditions: a code for each column of conditions; 0 is an unknown label.
    """

    col: bytes
    val: bytes
    num_genes: int
    library: float
    conditions: tuple[int, ...] = ()


class CellProcessor:
    """List of N `CellRow` of one species -> the tensors that a model gets.

    {"library": float32 (N,), "conditions": int64 (N, C)} and, sparse, {"crow": int64 (N + 1,),
    "col": int32 (R,), "val": float32 (R,)}, which `densify` turns into a matrix on the model's
    device; or, dense, {"values": float32 (N, G)}.

    Args:
        num_genes: G.
        form: "sparse" or "dense".
        counts: the values are whole: "library" is int64, and "val" or "values" int32. Mixed
            precision casts what a batch holds in floating point, and bfloat16 has no 257.

    Raises:
        ConfigError: an unknown form.
    """

    def __init__(self, num_genes: int, *, form: str = "sparse", counts: bool = False) -> None:
        if form not in FORMS:
            raise ConfigError(f"the form of cells is {form!r}; it must be {' or '.join(FORMS)}.")
        self.num_genes, self.form, self.counts = num_genes, form, counts

    def __call__(self, rows: list[CellRow]) -> dict[str, Tensor]:
        """Join the rows.

        Raises:
            DataError: a row of another gene list.
        """
        for row in rows:
            if row.num_genes != self.num_genes:
                raise DataError(
                    f"a cell has {row.num_genes} genes; the model takes {self.num_genes}. Read the "
                    'data with the model\'s own gene list (option "vocabulary").'
                )
        count = len(rows)
        library = torch.tensor([row.library for row in rows], dtype=torch.float64)
        library = library.long() if self.counts else library.float()
        conditions = torch.tensor([row.conditions for row in rows], dtype=torch.int64)
        found = {"library": library, "conditions": conditions.reshape(count, -1)}
        # filled at once: a second copy of the entries costs as much as the matrix
        col = np.frombuffer(bytearray().join([row.col for row in rows]), dtype=PLACE)
        val = np.frombuffer(bytearray().join([row.val for row in rows]), dtype=VALUE)
        val = val.astype(np.int32) if self.counts else val
        crow = np.zeros(count + 1, dtype=np.int32 if self.form == "dense" else np.int64)
        np.cumsum([len(row.val) // VALUE.itemsize for row in rows], out=crow[1:])
        if self.form == "dense":
            matrix = scipy.sparse.csr_matrix((val, col, crow), shape=(count, self.num_genes))
            return {"values": torch.from_numpy(matrix.toarray()), **found}
        parts = {"crow": crow, "col": col, "val": val}
        return {**{name: torch.from_numpy(part) for name, part in parts.items()}, **found}


def densify(crow: Tensor, col: Tensor, val: Tensor, *, num_genes: int) -> Tensor:
    """Compressed rows as a matrix (N, G), on their device and in their dtype."""
    count = len(crow) - 1
    rows_R = torch.repeat_interleave(
        torch.arange(count, device=crow.device) * num_genes, crow.diff(), output_size=len(col)
    )
    dense = torch.zeros(count * num_genes, dtype=val.dtype, device=val.device)
    dense[rows_R + col] = val
    return dense.view(count, num_genes)


def log_normalise(values: Tensor, library: Tensor | None = None) -> Tensor:
    """log(1 + 1e4 x / sum of the cell), (N, G); an empty cell stays zero.

    Args:
        values: counts (N, G).
        library: their sums (N,), where known.
    """
    total_N = values.sum(-1) if library is None else library.to(values.dtype)
    scale_N = TARGET_SUM / torch.where(total_N > 0, total_N, 1.0)
    return torch.log1p(values * scale_N.unsqueeze(-1))
