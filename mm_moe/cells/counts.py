"""Counts of a batch on their way to the experts: sparse at home, a matrix where they are read.

N cells of a species, R rows of all species one after the other, G genes, T entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mm_moe.errors import DataError
from mm_moe.moe.placed import Plan

TARGET_SUM = 1e4  # counts that a cell is scaled to before the logarithm
Payload = Mapping[str, Tensor]


@dataclass(frozen=True)
class SparseRows:
    """Rows of any length.

    Attributes:
        col: places of genes, int64 (T,).
        val: counts (T,).
        length_R: entries of each row, int64 (R,).
        total_R: the sum by which a row is normalised (R,).
    """

    col: Tensor
    val: Tensor
    length_R: Tensor
    total_R: Tensor

    @classmethod
    def of(cls, payload: Payload, *, dtype: torch.dtype) -> SparseRows:
        """From {"values"} (N, G), or {"crow", "col", "val"}; "library" (N,) where it is known."""
        if "values" in payload:
            values_NG = payload["values"]
            row, col = values_NG.nonzero(as_tuple=True)
            val = values_NG[row, col].to(dtype)
            length = torch.bincount(row, minlength=len(values_NG))
        else:
            crow, col, val = payload["crow"], payload["col"].long(), payload["val"].to(dtype)
            length = crow.diff().long()
            row = torch.repeat_interleave(
                torch.arange(len(length), device=crow.device), length, output_size=len(col)
            )
        library = payload.get("library")
        if library is None:
            library = val.new_zeros(len(length)).index_add(0, row, val)
        return cls(col, val, length, library.to(dtype))

    @classmethod
    def joined(cls, parts: Sequence[SparseRows]) -> SparseRows:
        """Rows one after the other."""
        fields = ("col", "val", "length_R", "total_R")
        return cls(*(torch.cat([getattr(part, field) for part in parts]) for field in fields))

    def sent(self, plan: Plan) -> SparseRows:
        """The rows that arrive where their experts are. A collective."""
        col, length_R = plan.send_entries(self.col, self.length_R)
        val, _ = plan.send_entries(self.val, self.length_R)
        total_R, _ = plan.send_entries(self.total_R, torch.ones_like(self.length_R))
        return SparseRows(col, val, length_R, total_R)

    def split(self, counts: Sequence[int]) -> list[SparseRows]:
        """Pieces with so many rows each."""
        lengths, totals = self.length_R.split(list(counts)), self.total_R.split(list(counts))
        entries = [int(length.sum()) for length in lengths]
        parts = zip(self.col.split(entries), self.val.split(entries), lengths, totals, strict=True)
        return [SparseRows(*part) for part in parts]


@dataclass(frozen=True)
class GeneRows:
    """Cells of one species where its expert is; matrices are made when they are asked for.

    Attributes:
        rows: their entries.
        num_genes: G.
    """

    rows: SparseRows
    num_genes: int

    def __len__(self) -> int:
        return len(self.rows.length_R)

    @cached_property
    def row_T(self) -> Tensor:
        """The cell of each entry."""
        number = torch.arange(len(self), device=self.rows.col.device)
        return number.repeat_interleave(self.rows.length_R, output_size=len(self.rows.col))

    @cached_property
    def place_T(self) -> Tensor:
        """The place of each entry in the matrix, read row by row."""
        return self.row_T * self.num_genes + self.rows.col

    @cached_property
    def sum_N(self) -> Tensor:
        """Counts of each cell in these genes."""
        return self.rows.val.new_zeros(len(self)).index_add(0, self.row_T, self.rows.val)

    @cached_property
    def counts(self) -> Tensor:
        """(N, G)."""
        return self._matrix(self.rows.val)

    @cached_property
    def profile(self) -> Tensor:
        """Log-normalised (N, G): log(1 + 1e4 x / sum of the cell); an empty cell stays zero."""
        scale_N = TARGET_SUM / torch.where(self.rows.total_R > 0, self.rows.total_R, 1.0)
        return self._matrix(torch.log1p(self.rows.val * scale_N[self.row_T]))

    def _matrix(self, val: Tensor) -> Tensor:
        flat = val.new_zeros(len(self) * self.num_genes)
        return flat.index_copy_(0, self.place_T, val).view(len(self), self.num_genes)


def check_payload(payload: Payload, *, species: str, num_genes: int, count: int) -> None:
    """Refuse counts that are not of this species and these cells.

    Raises:
        DataError: another number of cells or genes.
    """
    sparse = "values" not in payload
    found = len(payload["crow"]) - 1 if sparse else len(payload["values"])
    if found != count:
        raise DataError(
            f"the batch holds {found} cells of {species!r}, but {count} are marked as such."
        )
    genes = num_genes
    if not sparse:
        genes = payload["values"].shape[1]
    elif len(payload["col"]):
        genes = max(num_genes, int(payload["col"].max()) + 1)
    if genes != num_genes:
        raise DataError(
            f"cells of {species!r} have counts of {genes} genes, the model knows {num_genes}; "
            "read them with the gene list of the model."
        )
