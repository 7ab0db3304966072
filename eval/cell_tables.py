"""Cells of each species as compressed rows in memory, with what a model and its scores ask for.

N cells of a species, G of its genes, K columns of conditions, D latent width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from mm_moe.batch import Batch
from mm_moe.cells.modeling import CellVAE
from mm_moe.data.cells.vocabulary import codes
from mm_moe.data.sets.cells import CellsData
from mm_moe.errors import DataError

SCALE = 1e4  # counts of a cell before the logarithm
ROWS = 512  # cells that are a matrix at once


@dataclass(frozen=True)
class CellTable:
    """Cells of one species.

    Attributes:
        counts: sparse (N, G).
        genes: names, in the order of the counts.
        ids: text (N,).
        conditions: codes (N, K); 0 is unknown.
        types: name of each cell's type or None (N,).
    """

    counts: scipy.sparse.csr_matrix
    genes: tuple[str, ...]
    ids: np.ndarray
    conditions: np.ndarray
    types: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, places: np.ndarray) -> CellTable:
        """The cells at some places."""
        return replace(
            self,
            counts=self.counts[places],
            ids=self.ids[places],
            conditions=self.conditions[places],
            types=self.types[places],
        )

    def of_genes(self, genes: tuple[str, ...]) -> CellTable:
        """The counts of some genes, in that order."""
        place = {gene: number for number, gene in enumerate(self.genes)}
        return replace(self, counts=self.counts[:, [place[gene] for gene in genes]], genes=genes)

    def values(self) -> np.ndarray:
        """log(1 + 1e4 x / sum of the cell), float32 (N, G); an empty cell stays zero."""
        total_N = np.asarray(self.counts.sum(1)).ravel()
        scale = scipy.sparse.diags(SCALE / np.where(total_N > 0, total_N, 1.0))
        return np.log1p(np.asarray((scale @ self.counts).todense(), np.float32))

    def payload(self) -> dict[str, Tensor]:
        """What a `CellVAE` gets."""
        counts = self.counts
        return {
            "crow": torch.from_numpy(counts.indptr.astype(np.int64)),
            "col": torch.from_numpy(counts.indices.astype(np.int32)),
            "val": torch.from_numpy(counts.data.astype(np.float32)),
            "library": torch.from_numpy(np.asarray(counts.sum(1)).ravel().astype(np.float32)),
            "conditions": torch.from_numpy(self.conditions),
        }


Tables = Mapping[str, CellTable]


def read_tables(source: CellsData, split: str, *, types: str = "") -> dict[str, CellTable]:
    """The cells of a split by species.

    Args:
        source: what reads the files.
        split: its name.
        types: column with the types of the cells, where a file has it.
    """
    found = {}
    columns = source.vocabulary.conditions
    for species, cells in source.species_rows(split).items():
        parts = []
        genes = tuple(source.vocabulary.genes[species])
        for number, places in cells.rows:
            file = source.files[number]
            rows = file.memory.take(places)
            counts = scipy.sparse.csr_matrix(
                (rows.val, rows.col, rows.crow), shape=(len(places), len(genes))
            )
            known = [codes(file.column(name)[places], labels) for name, labels in columns.items()]
            conditions = np.stack([*known], 1) if known else np.zeros((len(places), 0))
            named = file.column(types)[places] if types else np.full(len(places), "")
            types_N = np.array([str(one) or None for one in named], dtype=object)
            ids = file.names()[places]
            parts.append(CellTable(counts, genes, ids, conditions.astype(np.int64), types_N))
        if not parts:
            raise DataError(f"split {split!r} has no cell of {species!r}; take another.")
        found[species] = joined(parts)
    return found


def joined(parts: list[CellTable]) -> CellTable:
    """Cells of the same genes one after the other."""
    return CellTable(
        scipy.sparse.vstack([part.counts for part in parts], format="csr"),
        parts[0].genes,
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.conditions for part in parts]),
        np.concatenate([part.types for part in parts]),
    )


def variable_genes(table: CellTable, count: int) -> tuple[str, ...]:
    """The genes whose log-normalised values vary most over the cells, in the table's order."""
    order = np.argsort(-table.values().var(0), kind="stable")[:count]
    return tuple(table.genes[place] for place in np.sort(order))


def batch_of(tables: Tables) -> Batch:
    """All cells of some tables as one batch, species by species."""
    present = torch.zeros(sum(len(table) for table in tables.values()), len(tables)).bool()
    first = 0
    for place, table in enumerate(tables.values()):
        present[first : first + len(table), place] = True
        first += len(table)
    ids = [str(name) for table in tables.values() for name in table.ids]
    inputs = {name: table.payload() for name, table in tables.items() if len(table)}
    return Batch.of(ids, present, inputs)


def dense_parts(table: CellTable) -> Iterator[Tensor]:
    """The counts as matrices of some hundred cells."""
    for first in range(0, len(table), ROWS):
        part = np.asarray(table.counts[first : first + ROWS].todense(), np.float32)
        yield torch.from_numpy(part)


@torch.no_grad()
def encoded(model: CellVAE, table: CellTable, species: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and logarithm of the variance of each cell's posterior, (N, D) both."""
    found = [model.encode(part, species) for part in dense_parts(table)]
    mu, logvar = (torch.cat([getattr(one, name) for one in found]) for name in ("mu", "logvar"))
    return mu.double().numpy(), logvar.double().numpy()


@torch.no_grad()
def decoded(model: CellVAE, mu: np.ndarray, table: CellTable, species: str) -> np.ndarray:
    """Expected values (N, G) of cells in their own species, given their conditions."""
    z = torch.from_numpy(mu).float()
    conditions = torch.from_numpy(table.conditions)
    pairs = zip(z.split(ROWS), conditions.split(ROWS), strict=True)
    return torch.cat([model.decode(part, species, own) for part, own in pairs]).numpy()


@torch.no_grad()
def translated(model: CellVAE, table: CellTable, source: str, target: str) -> np.ndarray:
    """Expected values (N, G of the target) of cells, had they been of the target species."""
    parts, conditions = dense_parts(table), torch.from_numpy(table.conditions).split(ROWS)
    found = [
        model.translate(part, source, target, metadata=own)
        for part, own in zip(parts, conditions, strict=True)
    ]
    return torch.cat(found).numpy()


@torch.no_grad()
def reconstruction_loss(model: CellVAE, table: CellTable, species: str) -> float:
    """Mean negative log-likelihood (or squared error) of a cell given the mean of its posterior."""
    total = 0.0
    for first in range(0, len(table), ROWS):
        part = table.rows(np.arange(first, min(first + ROWS, len(table))))
        present = torch.zeros(len(part), len(model.modalities)).bool()
        present[:, model.modalities.index(species)] = True
        output = model(present=present, inputs={species: part.payload()})
        total += float(output.losses["reconstruction"].double().sum())
    return total / len(table)
