"""ADNI: grey matter, genotypes, clinical data and biospecimens against the diagnosis.

Layout, merged already:
    label.csv (PTID, DIAGNOSIS 1 to 3), PTID_splits.json ({"training", "validation", "testing"}),
    image/ADNI_G.npy, image/ADNI_subj.txt, image/BLSA_..._muse_seg_DS222.nii.gz,
    genomic/genomic_merged.h5ad, clinical/clinical_merged.csv, biospecimen/biospecimen_merged.csv
or, in place of any of them, the study's own files:
    DXSUM_....csv for the labels; MEDHIST, NEUROEXM, PTDEMOG, RECCMEDS and VITALS for the clinical
    data; APOERES and UPENNBIOMK_ROCHE_ELECSYS for the biospecimens (a date behind the name is
    borne); genomic/NAME.bed, .bim, .fam for the genotypes.

Without PTID_splits.json the participants are dealt 70 : 15 : 15 within each diagnosis, in an order
that depends on the seed; the output then holds the file. A modality whose files are not there is
left out. Everything that is fitted (ranges, means, modes, levels) is fitted on training rows.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from mm_moe.data.chance import draws
from mm_moe.data.prepare import adni_tables
from mm_moe.data.prepare.adni_genes import Genotypes, read_genotypes
from mm_moe.data.prepare.adni_images import AXES, GreyMatter
from mm_moe.data.prepare.csv_tables import find_table
from mm_moe.data.prepare.encoding import TableEncoder
from mm_moe.data.prepare.raw import ARRAYS, SPLITS, RawDataSet, RawRow, Volume, read_json
from mm_moe.data.schema import SINGLE_LABEL
from mm_moe.errors import ConfigError, DataError

LETTERS = {"I": "mri", "G": "genomic", "C": "clinical", "B": "biospecimen"}
TABLES = ("clinical", "biospecimen")
SPLIT_FILE = "PTID_splits.json"
SPLIT_NAMES = {"train": "training", "validation": "validation", "test": "testing"}
SHARES = (0.70, 0.85)  # where validation begins, and where test does
FILES = {  # what to look for, in messages
    "mri": "image/ADNI_G.npy",
    "genomic": "genomic/genomic_merged.h5ad or genomic/*.bed",
    "clinical": "clinical/clinical_merged.csv or the study tables",
    "biospecimen": "biospecimen/biospecimen_merged.csv or the study tables",
}


class AdniRaw(RawDataSet):
    """The folder of ADNI files.

    Args:
        source: the folder.
        modalities: letters of I, G, C, B; None: those whose files are there.
        seed: of the split, where the download has none.
        genotypes: "counts": uint8 allele counts, 3 where not called; "scaled": the training mode
            where not called, then each variant to [-1, 1], as published.
        dementia_drugs: "drop" or "keep" lines of RECCMEDS that name a drug against dementia.
        max_variants: more genotypes than that are refused.

    Raises:
        ConfigError: an option that cannot be.
        DataError: a file is missing or breaks its layout, or a participant is in two splits.
    """

    name = "adni"
    problem_type = SINGLE_LABEL
    task = SINGLE_LABEL
    label_names = ("CN", "MCI", "dementia")
    license = "ADNI (data use agreement, adni.loni.usc.edu); not to be shared"
    notes = (
        "All fitted numbers come from the training rows; published loaders fit on all rows.",
        "Columns that tell the diagnosis (years of onset and diagnosis) are dropped and listed.",
        "Grey matter is standardised inside the mask and 0 outside.",
        "Rows are participants; ids are pseudonyms.",
    )
    private = True
    groups_apart = True

    def __init__(
        self,
        source: Path,
        *,
        modalities: str | None = None,
        seed: int = 0,
        genotypes: str = "counts",
        dementia_drugs: str = "drop",
        max_variants: int = 200_000,
    ) -> None:
        super().__init__(source)
        if genotypes not in ("counts", "scaled"):
            raise ConfigError(f"adni: genotypes is {genotypes!r}; take counts or scaled.")
        if dementia_drugs not in ("drop", "keep"):
            raise ConfigError(f"adni: dementia_drugs is {dementia_drugs!r}; take drop or keep.")
        if modalities is not None and (not modalities or set(modalities) - set(LETTERS)):
            raise ConfigError(f"adni: modalities is {modalities!r}; take letters of IGCB.")
        self.asked, self.seed, self.genotypes = modalities, seed, genotypes
        self.drugs, self.max_variants = dementia_drugs, max_variants
        self.told = adni_tables.Findings()
        self.label_path, cells = self._labels()
        self.labels = {name: _diagnosis(cell) for name, cell in cells.items()}
        self.dealt, self.own_split = self._deal()
        self.images: GreyMatter | None = None
        self.genes: Genotypes | None = None
        self.tables: dict[str, EncodedTable] = {}
        self._read_modalities()

    def _labels(self) -> tuple[Path, dict[str, str]]:
        """Where the diagnoses are from, and PTID -> its cell."""
        path = self.source / "label.csv"
        if path.is_file():
            table = adni_tables.read_merged(path)
            if adni_tables.DIAGNOSIS not in table:
                raise DataError(f"{path} has no column 'DIAGNOSIS'.")
            return path, table[adni_tables.DIAGNOSIS].fillna("").to_dict()
        visits = find_table(self.source, "DXSUM", folders=adni_tables.FOLDERS)
        if visits is None:
            raise DataError(
                f"{str(self.source)!r} is not in the layout of 'adni': there is no label.csv and "
                f"no DXSUM....csv; see the docstring of {type(self).__module__}."
            )
        return visits, adni_tables.labels_from_visits(visits)

    def _deal(self) -> tuple[dict[str, list[str]], bool]:
        """Split -> participants, and whether we dealt them."""
        path = self.source / SPLIT_FILE
        if not path.is_file():
            return stratified(self.labels, seed=self.seed), True
        content = read_json(path, kind=dict)
        dealt: dict[str, list[str]] = {}
        seen: set[str] = set()
        for split, theirs in SPLIT_NAMES.items():
            names = content.get(theirs)
            if not isinstance(names, list):
                raise DataError(f"{path} has no list {theirs!r}.")
            twice = [place for place, name in enumerate(names, 1) if str(name) in seen]
            if twice:
                raise DataError(
                    f"{path}: entry {twice[0]} of {theirs!r} is in an earlier split too "
                    f"({len(twice)} such entries); a participant belongs to one split."
                )
            dealt[split] = list(dict.fromkeys(map(str, names)))
            seen |= set(dealt[split])
            dealt[split] = [name for name in dealt[split] if name in self.labels]
        return dealt, False

    def _read_modalities(self) -> None:
        """Open what is there, fit it on the training rows, settle the order of the modalities."""
        wanted = [LETTERS[letter] for letter in (self.asked or LETTERS)]
        train = set(self.dealt["train"])
        if "mri" in wanted and (self.source / "image" / "ADNI_G.npy").is_file():
            self.images = GreyMatter(self.source / "image")
            self.volumes = {"mri": Volume(self.images.mask, AXES)}
            scanned = [name for name in self.dealt["train"] if name in self.images.row_of]
            self.spread = self.images.spread(scanned)
        if "genomic" in wanted:
            self.genes = read_genotypes(
                self.source / "genomic", self.labels, max_variants=self.max_variants
            )
            if self.genes:
                self.genes.fit(train)
        for part in (part for part in TABLES if part in wanted):
            table = self._table(part)
            if table is not None:
                table = adni_tables.drop_forbidden(table, part, self.told)
                self.tables[part] = EncodedTable(table, part, train=train, wanted=self.labels)
        there = {"mri": self.images, "genomic": self.genes, **self.tables}
        self.kinds = {name: ARRAYS for name in wanted if there.get(name)}
        lost = [name for name in wanted if name not in self.kinds]
        if not self.kinds or (self.asked and lost):
            raise DataError(
                f"{str(self.source)!r} has no {FILES[lost[0]]}; download it, or take other "
                '--options \'{"modalities": "..."}\'.'
            )
        self.not_there = lost
        dosages = "dosages" if self.genotypes == "counts" else "table"
        forms = {"mri": "volume", "genomic": dosages} | dict.fromkeys(TABLES, "table")
        self.forms = {name: forms[name] for name in self.kinds}

    def _table(self, part: str) -> pd.DataFrame | None:
        """The clinical data or the biospecimens, indexed by PTID; None where there are none."""
        for ending in ("", "_mean"):
            path = self.source / part / f"{part}_merged{ending}.csv"
            if path.is_file():
                return adni_tables.read_merged(path)
        return adni_tables.read_study(self.source, part, self.told, drugs=self.drugs)

    def splits(self) -> tuple[str, ...]:
        """Train, validation and test, by participants."""
        return SPLITS

    def indices(self) -> list[Path]:
        """The labels, and the split where the download has one."""
        return [self.label_path, *([] if self.own_split else [self.source / SPLIT_FILE])]

    def key_files(self) -> list[Path]:
        """The labels: another split keeps the pseudonyms."""
        return [self.label_path]

    @property
    def options(self) -> dict[str, Any]:
        """The options as they were taken."""
        return {
            "modalities": self.asked,
            "seed": self.seed if self.own_split else None,
            "genotypes": self.genotypes,
            "dementia_drugs": self.drugs,
        }

    def findings(self) -> dict[str, Any]:
        """Leaks, columns and counts; no cell."""
        told: dict[str, Any] = {
            "modalities not there": self.not_there,
            "leakage columns dropped": self.told.leaks,
            "study tables": self.told.tables,
            "lines with drugs against dementia": self.told.drug_rows,
            "biospecimen lines without participant": self.told.unmapped_rows,
            "in no split": len(self.labels) - sum(map(len, self.dealt.values())),
        }
        if self.images:
            told["scans that failed"] = self.images.failed
        if self.genes:
            told["variants left out"] = self.genes.skipped
        return told | {part: table.record for part, table in self.tables.items()}

    def extras(self) -> dict[str, bytes]:
        """The split that was dealt here, in the layout of the published file."""
        if not self.own_split:
            return {}
        named = {SPLIT_NAMES[split]: names for split, names in self.dealt.items()}
        return {SPLIT_FILE: json.dumps(named, indent=1).encode()}

    def rows(self, split: str) -> Iterator[RawRow]:
        """One row for each participant."""
        for name in self.dealt[split]:
            label = self.labels[name]
            if label is None:
                yield RawRow(name, fault="DIAGNOSIS is not 1, 2 or 3")
                continue
            try:
                payload = self._payload(name)
            except ValueError as error:
                yield RawRow(name, fault=str(error))
                continue
            yield RawRow(name, payload, label, group=name)

    def _payload(self, name: str) -> dict[str, Any]:
        """What the files have of one participant."""
        payload: dict[str, Any] = {}
        values_V = self.images.values(name) if self.images else None
        if values_V is not None:
            mean, std = self.spread
            payload["mri"] = (values_V - mean) / std
        counts_D = self.genes.counts(name) if self.genes else None
        if self.genes and counts_D is not None:
            scaled = self.genotypes == "scaled"
            payload["genomic"] = self.genes.scaled(counts_D) if scaled else counts_D
        for part, table in self.tables.items():
            if name in table.row_of:
                payload[part] = table.values_ND[table.row_of[name]]
        return payload


class EncodedTable:
    """The rows of a table as numbers.

    Args:
        table: one row per PTID.
        part: its modality, for messages.
        train: whose rows the encoding is fitted on.
        wanted: whose rows are kept.

    Raises:
        DataError: no column has a training value.
    """

    def __init__(
        self, table: pd.DataFrame, part: str, *, train: Collection[str], wanted: Collection[str]
    ) -> None:
        table = table[table.index.isin(list(wanted))]
        encoder = TableEncoder(table[table.index.isin(list(train))])
        if not encoder.width:
            raise DataError(f"adni: the {part} data have no column with training values.")
        self.values_ND = encoder.encode(table)
        self.row_of = {name: row for row, name in enumerate(table.index)}
        self.record = encoder.record()


def stratified(labels: dict[str, int | None], *, seed: int) -> dict[str, list[str]]:
    """Split -> participants: 70 : 15 : 15 of each class, in an order that the seed decides.

    Edges are rounded down; a class of 10 gives 7, 1 and 2.
    """
    classes = sorted(set(labels.values()), key=lambda label: -1 if label is None else label)
    dealt: dict[str, list[str]] = {split: [] for split in SPLITS}
    for label in classes:
        names = [name for name, own in labels.items() if own == label]
        names.sort(key=lambda name: (draws(name, purpose="split", dataset="adni", seed=seed), name))
        first, second = (int(round(share * len(names), 6)) for share in SHARES)
        parts = (names[:first], names[first:second], names[second:])
        for split, part in zip(SPLITS, parts, strict=True):
            dealt[split] += part
    return dealt


def _diagnosis(cell: str) -> int | None:
    """1, 2, 3 as 0, 1, 2; None for anything else."""
    return {"1": 0, "2": 1, "3": 2}.get(str(cell).strip().removesuffix(".0"))
