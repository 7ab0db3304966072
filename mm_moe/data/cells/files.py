"""One file as a species reads it: its genes in the species' order, its cells checked and counted.

N cells of the file, G genes of the species.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mm_moe.data.cells.listing import Listed
from mm_moe.data.cells.rows import Rows
from mm_moe.data.cells.stores import CellStore
from mm_moe.errors import DataError

SPECIES = "species"  # the column that tells a mixed file
GENOMES = re.compile(r"(hg19|hg38|GRCh37|GRCh38|mm9|mm10|mm39|GRCm38|GRCm39)_+")
SCANNED = 2048  # cells that are checked at once
OWN_SHARE = 0.9  # of the counts, under which a cell of a mixed file is of no single species
GAP = 16  # rows between two wanted ones that are read along
EMPTY = "all-zero"


@dataclass
class CellFile:
    """A file of one species.

    Attributes:
        listed: where it comes from.
        store: what reads it.
        place_G: place of each of the store's genes in the species' list, -1 for none; None: the
            lists are the same.
        kept: rows that are used, in order: int64.
        library: sum of the values of every row of the file: float64 (N,).
        dropped: reason -> the rows that are not used for it.
        keep: whether its cells stay in memory once they are read.
    """

    listed: Listed
    store: CellStore
    place_G: np.ndarray | None
    kept: np.ndarray
    library: np.ndarray
    dropped: dict[str, np.ndarray] = field(default_factory=dict)
    keep: bool = False
    _memory: Rows | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory": None}

    @property
    def memory(self) -> Rows:
        """All its cells, for a file that is kept."""
        if self._memory is None:
            parts = [
                self._projected(self.store.read(begin, min(begin + SCANNED, self.store.num_rows)))
                for begin in range(0, self.store.num_rows, SCANNED)
            ]
            self._memory = Rows.joined(parts)
        return self._memory

    def _projected(self, rows: Rows) -> Rows:
        return rows if self.place_G is None else rows.with_genes(self.place_G)

    def names(self) -> np.ndarray:
        """Ids of all rows: the species, the file, the cell's name; a number where it comes again.

        Text (N,).
        """
        if self.store.full_names:
            return self.store.names
        stem = f"{self.listed.species}/{self.listed.path.stem}"
        names = np.array([f"{stem}:{name}" for name in self.store.names], dtype=object)
        for row in np.flatnonzero(self.store.duplicated):
            names[row] += f"#{row}"
        return names

    def column(self, name: str) -> np.ndarray:
        """Labels of a column, "" where there are none; the species is that of the listing."""
        if name == SPECIES:
            return np.full(self.store.num_rows, self.listed.species, dtype=object)
        if name not in self.store.columns:
            return np.full(self.store.num_rows, "", dtype=object)
        return self.store.column(name)

    def read(self, rows: np.ndarray) -> Rows:
        """Some rows, given in ascending order, with the species' genes."""
        if self.keep:
            return self.memory.take(rows)
        breaks = np.flatnonzero(np.diff(rows) > GAP) + 1
        parts = []
        for group in np.split(rows, breaks):
            first = int(group[0])
            block = self.store.read(first, int(group[-1]) + 1)
            parts.append(block if len(group) == len(block.crow) - 1 else block.take(group - first))
        return self._projected(Rows.joined(parts))


def unique_genes(names: Sequence[str]) -> tuple[str, ...]:
    """Names of genes, where one that comes again gets "-1", "-2", ..., as in AnnData."""
    if len(set(names)) == len(names):
        return tuple(names)
    seen: dict[str, int] = {}
    found = []
    for name in names:
        count = seen.get(name, 0)
        seen[name] = count + 1
        found.append(f"{name}-{count}" if count else name)
    return tuple(found)


def own_genes(store: CellStore, prefix: str) -> dict[str, int]:
    """Gene -> its place in the file, of those with the prefix, which they lose.

    Raises:
        DataError: no gene has it.
    """
    genes = unique_genes(store.genes)
    if prefix:
        found = {g[len(prefix) :]: n for n, g in enumerate(genes) if g.startswith(prefix)}
    else:
        found = {g: n for n, g in enumerate(genes)}
    if not found:
        raise DataError(
            f"{store.path} has no gene whose name begins with {prefix!r}; its first ones are "
            f"{', '.join(genes[:3])}."
        )
    return found


def refuse_mixed(store: CellStore, listed: Listed) -> None:
    """Refuse a file of several species that is read as if it were of one.

    Raises:
        DataError: it is.
    """
    if not (listed.only or listed.prefix) and SPECIES in store.columns:
        labels = sorted(set(store.column(SPECIES)) - {""})
        if len(labels) > 1:
            raise DataError(
                f"{store.path} holds cells of several species ({', '.join(labels)}); say which are "
                f'of {listed.species!r}: "files": {{"{listed.species}": {{"path": '
                f'"{store.path.name}", "only": {{"species": "{labels[0]}"}}}}}}.'
            )
    if not listed.prefix:
        matches = [GENOMES.match(gene) for gene in store.genes]
        found = sorted({match[0] for match in matches if match})
        if len(found) > 1 and all(matches):
            raise DataError(
                f"{store.path} holds genes of several species ({', '.join(found)}); say which are "
                f'of {listed.species!r}: "files": {{"{listed.species}": {{"path": '
                f'"{store.path.name}", "genes": "{found[0]}"}}}}.'
            )


def wanted_rows(store: CellStore, listed: Listed, dropped: dict[str, np.ndarray]) -> np.ndarray:
    """Which rows `only` leaves: bool (N,); the others are noted in `dropped`.

    Raises:
        DataError: it leaves none, or names a column that is not there.
    """
    wanted_N = np.ones(store.num_rows, dtype=bool)
    for column, labels in listed.only.items():
        own_N = store.column(column)
        for label in sorted(set(own_N) - set(labels)):
            there_N = wanted_N & (own_N == label)
            dropped[f"{column} is {label or 'not given'}"] = np.flatnonzero(there_N)
            wanted_N &= ~there_N
    if not store.num_rows:
        raise DataError(f"{store.path} holds no cell; leave it out.")
    if not wanted_N.any():
        raise DataError(
            f"{store.path} has no cell with {dict(listed.only)}; it has {store.num_rows:,} others."
        )
    return wanted_N


def refuse_repeated(rows: Rows, *, store: CellStore, begin: int) -> None:
    """Refuse cells that have a gene more than once: which of its values counts?

    Raises:
        DataError: names the first cell and its gene.
    """
    row_R = np.repeat(np.arange(len(rows.crow) - 1), np.diff(rows.crow))
    key_R = row_R * np.int64(len(store.genes)) + rows.col
    if (np.diff(key_R) > 0).all():
        return
    key_R = np.sort(key_R)  # not by gene in the file, which is fine
    again = np.flatnonzero(np.diff(key_R) == 0)
    if len(again):
        row, gene = divmod(int(key_R[again[0]]), len(store.genes))
        raise DataError(
            f"{store.path}: cell {store.names[begin + row]!r} (row {begin + row:,}) has gene "
            f"{store.genes[gene]!r} twice; add such values up (scipy: matrix.sum_duplicates())."
        )


def check_values(rows: Rows, *, store: CellStore, begin: int, counts: bool) -> None:
    """Refuse what is no count, or, of normalised values, what is negative or not finite.

    Raises:
        DataError: names the first cell, its gene and the value.
    """
    refuse_repeated(rows, store=store, begin=begin)
    good_R = (rows.val >= 0) & np.isfinite(rows.val)
    if counts:
        good_R &= rows.val == np.floor(rows.val)
    if good_R.all():
        return
    entry = int(np.flatnonzero(~good_R)[0])
    row = begin + int(np.searchsorted(rows.crow, entry, side="right")) - 1
    where = f"{store.path}: cell {store.names[row]!r} (row {row:,})"
    rule = "counts are whole numbers from 0" if counts else "values are finite and not negative"
    way = (
        'give raw counts ("layer": "raw" or a layer\'s name), or say "values": "normalised"'
        if counts
        else "mend the file"
    )
    raise DataError(
        f"{where} has {rows.val[entry]:g} for gene {store.genes[rows.col[entry]]!r}; {rule}: {way}."
    )


def scan(
    store: CellStore,
    listed: Listed,
    *,
    place_G: np.ndarray | None,
    counts: bool,
    keep: bool = False,
) -> CellFile:
    """Read a file once: check every value, sum every cell, and put aside what cannot be used.

    A cell whose counts are all zero is put aside. In a file of several genomes without a column
    that tells the species, so is a cell with less than 90% of its counts under its species' prefix.

    Raises:
        DataError: a value that cannot be, or nothing left.
    """
    dropped: dict[str, np.ndarray] = {}
    if store.checked == ("counts" if counts else "normalised") and place_G is None:
        wanted_N = wanted_rows(store, listed, dropped)
        kept = np.flatnonzero(wanted_N)
        return CellFile(listed, store, None, kept, store.library(), dropped, keep=keep)
    refuse_mixed(store, listed)
    wanted_N = wanted_rows(store, listed, dropped)
    blocks: list[Rows] = []
    library_N, total_N = np.zeros(store.num_rows), np.zeros(store.num_rows)
    for begin in range(0, store.num_rows, SCANNED):
        end = min(begin + SCANNED, store.num_rows)
        rows = store.read(begin, end)
        check_values(rows, store=store, begin=begin, counts=counts)
        total_N[begin:end] = rows.sums()
        own = rows if place_G is None else rows.with_genes(place_G)
        library_N[begin:end] = own.sums()
        blocks += [own] * keep
    if listed.prefix and not listed.only:
        mixed_N = wanted_N & (library_N < OWN_SHARE * total_N)
        key = f"under {OWN_SHARE:.0%} of the counts are of {listed.prefix}"
        dropped[key] = np.flatnonzero(mixed_N)
        wanted_N &= ~mixed_N
    empty_N = wanted_N & (library_N == 0)
    dropped[EMPTY] = np.flatnonzero(empty_N)
    dropped = {reason: rows for reason, rows in dropped.items() if len(rows)}
    kept = np.flatnonzero(wanted_N & ~empty_N)
    if not len(kept):
        why = ", ".join(f"{len(rows):,} {reason}" for reason, rows in dropped.items())
        raise DataError(f"{store.path} has no cell left for {listed.species!r}: {why}.")
    memory = Rows.joined(blocks) if keep else None
    return CellFile(listed, store, place_G, kept, library_N, dropped, keep=keep, _memory=memory)


def kept_files(entries: Sequence[int], *, memory_mib: float) -> list[bool]:
    """Which files stay in memory: those that fit beside the ones before them.

    Args:
        entries: values that are not zero, of each file.
        memory_mib: room for them, at 8 bytes each.
    """
    left, found = memory_mib * 2**20, []
    for count in entries:
        found.append(8 * count <= left)
        left -= 8 * count * found[-1]
    return found


def align(
    own: dict[str, int], wanted: Sequence[str], *, width: int, path: Path, lenient: bool
) -> tuple[np.ndarray | None, int]:
    """Where a file's genes belong in a species' list, and how many are not at their own place.

    Args:
        own: gene -> place in the file.
        wanted: the species' list.
        width: genes of the file, those of other species too.
        path: of the file.
        lenient: whether genes may lack (they are zero) and others be left out.

    Returns:
        int64 (width,) with -1 for genes that are left out, None where nothing has to be done; and
        the number of genes that another place holds.

    Raises:
        DataError: not lenient, and the lists differ in their genes.
    """
    target = {gene: place for place, gene in enumerate(wanted)}
    lost = [gene for gene in wanted if gene not in own]
    more = [gene for gene in own if gene not in target]
    if (lost or more) and not lenient:
        raise DataError(
            f"{path} has {len(own):,} genes where {len(wanted):,} are expected: {len(lost):,} are "
            f"missing ({', '.join(lost[:3]) or 'none'}), {len(more):,} are new "
            f'({", ".join(more[:3]) or "none"}); take the same genes, or say "genes": "common".'
        )
    place_G = np.full(width, -1, dtype=np.int64)
    moved = 0
    for rank, (gene, place) in enumerate(own.items()):
        place_G[place] = target.get(gene, -1)
        moved += target.get(gene, rank) != rank
    same = width == len(wanted) and bool((place_G == np.arange(width)).all())
    return (None if same else place_G), moved
