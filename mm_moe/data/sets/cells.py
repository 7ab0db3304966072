"""Single cells of several species that never occur together: counts of genes, streamed sparse.

A species is a modality, and every cell has exactly one.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import datasets
import numpy as np

from mm_moe.batch import Sample
from mm_moe.data.cells.files import CellFile, align, kept_files, own_genes, scan
from mm_moe.data.cells.listing import SPLITS, listed_files
from mm_moe.data.cells.order import check_sampler, species_line
from mm_moe.data.cells.reader import Place, SpeciesRows
from mm_moe.data.cells.rows import CellRow
from mm_moe.data.cells.splits import SplitRule
from mm_moe.data.cells.stores import CellStore, open_stores
from mm_moe.data.cells.vocabulary import Vocabulary, codes, labels_of, tell_unseen, unseen
from mm_moe.data.reading import file_sha256
from mm_moe.data.schema import NO_LABEL, SINGLE_LABEL, DataSource
from mm_moe.errors import ConfigError, DataError

VALUES = ("counts", "normalised")
GENES = ("same", "common")
PLACE = "place"
logger = logging.getLogger("mm_moe.data")


class CellsData(DataSource):
    """Cells from `.h5ad` files, chunks of `.npz` with metadata, or Parquet.

    Every file is read once at the start: its values are checked, all-zero cells are put aside and
    counted (`dropped`). Then cells are read by ranges of rows when they are needed; a batch holds
    their non-zero entries, and the model makes the matrix on its device.

    In training, cells come in an order of their own (`mm_moe.data.cells.order`): the sampler says
    whose turn it is, each species goes through its own shuffled passes, and all of it is keyed, so
    that it is the same on any number of processes and after a resume. Other splits come as they
    lie, one species after the other.

    Args:
        data_dir: where the files are.
        files: which of them belong to which species; see `mm_moe.data.cells.listing.listed_files`.
        conditions: columns whose labels go to the model as codes; "species" is the species' own
            name. Their labels are those of the training cells; any other has the code 0.
        label: column with the classes, where cells shall be classified or scored by them.
        group: column whose cells are no independent samples (donor).
        split_by: column whose cells stay in one split (donor); None: each cell is dealt alone.
        split_column: column that holds the names of the splits.
        shares: of train, validation and test, where neither files nor a column say the split.
        split_seed: another seed deals anew.
        layer: matrix of an `.h5ad`: None is X, "raw" is raw.X.
        values: "counts" are checked to be whole numbers; "normalised" only not to be negative.
        genes: "same": files of a species must have the same genes, in any order; "common": genes
            that not all have are left out, or, with a vocabulary, zero where they lack.
        vocabulary: genes and labels that a model was trained with, as an object or a JSON file.
        sampler: "uniform", "proportional", "alternating" or "longest"; see
            `mm_moe.data.cells.order.turns`.
        run: cells of one species in succession; the batch size gives batches of one species.
        memory_mib: files whose cells fit, one after the other, are kept in memory; the rest is read
            from disk in every epoch.
        pickles: whether metadata of chunks may be pickles; they are read by a reader that rebuilds
            tables and nothing else. `launch/prepare_data.py cells` makes Parquet of them.
        name: key of splits and masks.
        license: of the files.

    Attributes:
        vocabulary: genes and labels, to be saved with the model.
        conditions: the columns, in the order of a payload's codes.
        dropped: species -> reason -> number of cells that are not used.
        moved: species -> number of genes that a file has at another place.
        unseen: split -> column -> label -> number of cells whose label training does not have.

    Raises:
        ConfigError: an option that cannot work, or a package that is not installed.
        DataError: a file that is missing, cut, of several species, or holds what is no count.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        *,
        files: Mapping[str, Any] | None = None,
        conditions: Sequence[str] = (),
        label: str | None = None,
        group: str | None = None,
        split_by: str | None = None,
        split_column: str | None = None,
        shares: Sequence[float] = (0.8, 0.1, 0.1),
        split_seed: int = 0,
        layer: str | None = None,
        values: str = "counts",
        genes: str = "same",
        vocabulary: Mapping[str, Any] | str | None = None,
        sampler: str = "uniform",
        run: int = 1,
        memory_mib: float = 1024,
        pickles: bool = False,
        name: str = "cells",
        license: str = "that of the files",
    ) -> None:
        super().__init__(data_dir)
        if self.data_dir is None:
            raise ConfigError(
                "data set 'cells' needs data_dir: a folder of .h5ad, .npz or .parquet files."
            )
        for option, value, known in (("values", values, VALUES), ("genes", genes, GENES)):
            if value not in known:
                raise ConfigError(f"{option} is {value!r}; it must be {' or '.join(known)}.")
        check_sampler(sampler, run)
        _check_options(conditions, shares=shares, memory_mib=memory_mib)
        self.name, self.license, self.memory_mib = name, license, memory_mib
        self.sampler, self.run, self.genes, self.values = sampler, run, genes, values
        self.label, self.group, self.layer, self.pickles = label, group, layer, pickles
        self.rule = SplitRule(
            name, by=split_by, column=split_column, shares=tuple(shares), seed=split_seed
        )
        self._given = None if vocabulary is None else Vocabulary.of(vocabulary)
        self.listing = listed_files(files, self.data_dir)
        self.modalities = tuple(dict.fromkeys(one.species for one in self.listing))
        self.conditions = tuple(self._given.conditions if self._given else conditions)
        self._read_files()
        self._settle_columns()

    def _read_files(self) -> None:
        """Open, align and check every file."""
        stores = open_stores(self.listing, layer=self.layer, pickles=self.pickles)
        gene_lists = self._gene_lists(stores)
        kept = kept_files([store.num_entries for store in stores], memory_mib=self.memory_mib)
        self.moved: dict[str, int] = {}
        self.dropped: dict[str, dict[str, int]] = {}
        self._files: list[CellFile] = []
        for one, store, keep in zip(self.listing, stores, kept, strict=True):
            place_G, moved = align(
                own_genes(store, one.prefix),
                gene_lists[one.species],
                width=len(store.genes),
                path=one.path,
                lenient=self.genes == "common",
            )
            counts = self.values == "counts"
            file = scan(store, one, place_G=place_G, counts=counts, keep=keep)
            self._files.append(file)
            self._count(file, moved)
        self.left_out = {
            f"{species}: {reason}": count
            for species, counts in self.dropped.items()
            for reason, count in counts.items()
        }
        self._genes = gene_lists
        self._species = [one.species for one in self.listing]
        self._widths = [len(gene_lists[species]) for species in self._species]

    def _count(self, file: CellFile, moved: int) -> None:
        species = file.listed.species
        counts = self.dropped.setdefault(species, {})
        for reason, rows in file.dropped.items():
            counts[reason] = counts.get(reason, 0) + len(rows)
            logger.warning("%s: %d cells are not used: %s", file.listed.path, len(rows), reason)
        if moved:
            self.moved[species] = self.moved.get(species, 0) + moved
            logger.warning("%s: %d genes are put into order by name", file.listed.path, moved)

    def _gene_lists(self, stores: Sequence[CellStore]) -> dict[str, tuple[str, ...]]:
        """Species -> its genes: those of the vocabulary, or of its first file."""
        found: dict[str, tuple[str, ...]] = {}
        for one, store in zip(self.listing, stores, strict=True):
            if self._given is not None:
                if one.species not in self._given.genes:
                    known = ", ".join(self._given.genes)
                    raise DataError(
                        f"the vocabulary has no species {one.species!r}; it has: {known}."
                    )
                found[one.species] = self._given.genes[one.species]
                continue
            own = own_genes(store, one.prefix)
            if one.species not in found:
                found[one.species] = tuple(own)
            elif self.genes == "common":
                found[one.species] = tuple(g for g in found[one.species] if g in own)
        for species, genes in found.items():
            if not genes:
                raise DataError(f"the files of {species!r} have no gene in common; check them.")
        return found

    def _settle_columns(self) -> None:
        """Splits, vocabulary, codes and labels."""
        self._split_rows = self.rule.deal(self._files)
        self._codes = [
            np.zeros((f.store.num_rows, len(self.conditions)), dtype=np.int32) for f in self._files
        ]
        self.unseen: dict[str, dict[str, dict[str, int]]] = {}
        vocabulary = {c: self._settle_condition(n, c) for n, c in enumerate(self.conditions)}
        for split, found in self.unseen.items():
            tell_unseen(found, split=split)
        self.vocabulary = Vocabulary(self._genes, vocabulary)
        self.problem_type = NO_LABEL if self.label is None else SINGLE_LABEL
        self.label_names: tuple[str, ...] = ()
        if self.label is not None:
            kept = [file.column(self.label)[file.kept] for file in self._files]
            self.label_names = labels_of(kept)
            if not self.label_names:
                raise DataError(f"no file of cells has a label in the column {self.label!r}.")
            self._labels = [codes(f.column(self.label), self.label_names) - 1 for f in self._files]
        self._groups = [None if self.group is None else f.column(self.group) for f in self._files]

    def _settle_condition(self, place: int, column: str) -> tuple[str, ...]:
        """The labels of one column; the codes of all cells go to their place."""
        own = [file.column(column) for file in self._files]
        if self._given is not None:
            labels = self._given.conditions[column]
        else:
            train = self._split_rows.get("train", [])
            labels = labels_of(own[number][rows] for number, rows in train)
            if not labels:
                raise DataError(
                    f"no training cell has a label in the column {column!r}; leave it out of the "
                    "conditions."
                )
        for number, cells in enumerate(own):
            self._codes[number][:, place] = codes(cells, labels)
        for split, rows_of in self._split_rows.items():
            for number, rows in rows_of:
                counts = self.unseen.setdefault(split, {}).setdefault(column, {})
                for label, count in unseen(own[number][rows], labels).items():
                    counts[label] = counts.get(label, 0) + count
        return labels

    def splits(self) -> tuple[str, ...]:
        """Those that have cells."""
        return tuple(split for split in SPLITS if self.size_of(split))

    def size_of(self, split: str) -> int:
        """Cells of a split, 0 where it does not exist."""
        return sum(len(rows) for _, rows in self._split_rows.get(split, ()))

    @property
    def files(self) -> tuple[CellFile, ...]:
        """The files, in the order of the listing."""
        return tuple(self._files)

    def split_rows(self, split: str, number: int) -> np.ndarray:
        """Rows of a file that are in a split, ascending; none where it does not exist."""
        own = [rows for n, rows in self._split_rows.get(split, ()) if n == number]
        return np.concatenate([*own, np.empty(0, dtype=np.int64)]).astype(np.int64)

    def species_rows(self, split: str) -> dict[str, SpeciesRows]:
        """The cells of each species in a split, in the order of the modalities."""
        dealt = self._split_rows[self.check_split(split)]
        return {
            species: SpeciesRows(
                self._files, [(n, r) for n, r in dealt if self.listing[n].species == species]
            )
            for species in self.modalities
        }

    def stream(self, split: str) -> datasets.IterableDataset:
        """The cells as they lie, one species after the other."""
        self.check_split(split)
        stream: datasets.IterableDataset = datasets.IterableDataset.from_generator(
            _all_cells, gen_kwargs={"source": self, "split": split}
        )
        return stream

    def to_sample(self, row: dict[str, Any]) -> Sample:
        """The cell's non-zero genes; read now, if no cell beside it was."""
        number, at, window, within, epoch = row[PLACE]
        file = self._files[number]
        # of a file in memory no window is read
        col, val = file.memory.cell(at) if file.keep else window.rows.cell(within)
        species = self._species[number]
        codes = tuple(self._codes[number][at].tolist())
        cell = CellRow(col, val, self._widths[number], float(file.library[at]), codes)
        return self._sample(number, at, {species: cell}, epoch=epoch)

    def _sample(self, number: int, row: int, payload: dict[str, Any], *, epoch: int = 0) -> Sample:
        name = self._ids[number][row]
        label = None
        if self.label is not None and self._labels[number][row] >= 0:
            label = int(self._labels[number][row])
        column = self._groups[number]
        group = None
        if column is not None and column[row]:
            group = f"{self.listing[number].species}/{column[row]}"
        return Sample(name, payload, label, group, epoch=epoch)

    @cached_property
    def _ids(self) -> list[np.ndarray]:
        return [file.names() for file in self._files]

    def index(self, split: str) -> Iterator[Sample]:
        """Ids, groups and labels; no count is read."""
        for rows in self.species_rows(split).values():
            for number, own in rows.rows:
                for row in own.tolist():
                    yield self._sample(number, row, {})

    def size(self, split: str) -> int:
        """Cells of a split."""
        return self.size_of(self.check_split(split))

    def fingerprint(self) -> str:
        """sha256 of the files' own and of all that decides which cells are read as what."""
        facts = [
            [
                [one.species, one.split, one.prefix, sorted(one.only.items())]
                for one in self.listing
            ],
            [file_sha256(path) for one in self._files for path in one.store.files()],
            [self.rule.describe(), self.layer, self.values, self.genes, self.label, self.group],
            self.vocabulary.to_dict(),
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def line(
        self, split: str, *, seed: int, shuffle_buffer: int, start: int
    ) -> Iterator[tuple[int, dict[str, Any]]] | None:
        """Training cells by the sampler; other splits have no order of their own."""
        return self._drawn(seed, shuffle_buffer, start) if split == "train" else None

    def _drawn(
        self, seed: int, shuffle_buffer: int, start: int
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        rows = list(self.species_rows("train").values())
        turns = species_line(
            [len(own) for own in rows], sampler=self.sampler, run=self.run, seed=seed, start=start
        )
        lines: dict[int, Iterator[Place]] = {}
        for species, number in turns:
            if species not in lines:
                key = f"{self.name}/{seed}/{self.modalities[species]}"
                lines[species] = rows[species].shuffled(
                    key=key, buffer=shuffle_buffer, start=number
                )
            place = next(lines[species])
            yield place.epoch, {PLACE: place}


def _all_cells(source: CellsData, split: str) -> Iterator[dict[str, Any]]:
    """Rows of a split for `datasets`."""
    for rows in source.species_rows(split).values():
        for place in rows.in_order():
            yield {PLACE: place}


def _check_options(conditions: Any, *, shares: Any, memory_mib: Any) -> None:
    """Refuse options of another kind.

    Raises:
        ConfigError: names the option, its value and the rule.
    """
    texts = isinstance(conditions, list | tuple) and all(isinstance(c, str) for c in conditions)
    if not texts or len(set(conditions)) < len(conditions):
        raise ConfigError(f"conditions ({conditions!r}) must be a list of different columns.")
    if not isinstance(shares, list | tuple) or not all(map(_number, shares)):
        raise ConfigError(f"shares ({shares!r}) must be a list of three numbers.")
    if not _number(memory_mib):
        raise ConfigError(f"memory_mib ({memory_mib!r}) must be a number.")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
