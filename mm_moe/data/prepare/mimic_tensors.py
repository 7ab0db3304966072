"""MIMIC as the tensors of Flex-MoE and MoE-Retriever: laboratory, notes and codes as vectors.

Layout: lab_x.pt, note_x.pt, code_x.pt, 2-D tensors whose rows are those of labels.csv (subject_id,
one_year_mortality 0 or 1), and PTID_splits_mimic.json ({"training", "validation", "testing"} of
subject ids). Without the last one, patients are dealt 70 : 15 : 15 by a keyed hash.

The published loader takes every row for complete. Here a row of zeros alone, or one that is -2
throughout (the published mark of a gap), is missing. Vectors are standardised by training rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mm_moe.data.chance import split_of
from mm_moe.data.prepare.csv_tables import read_table
from mm_moe.data.prepare.raw import ARRAYS, SPLITS, RawDataSet, RawRow, read_json
from mm_moe.data.schema import BINARY_AUPRC, SINGLE_LABEL
from mm_moe.errors import DataError

FILES = {"labs": "lab_x.pt", "notes": "note_x.pt", "codes": "code_x.pt"}
LABELS, SPLIT_FILE = "labels.csv", "PTID_splits_mimic.json"
SPLIT_NAMES = {"train": "training", "validation": "validation", "test": "testing"}
SHARES = {"train": 0.7, "validation": 0.15, "test": 0.15}
GAP = -2.0
WRONG = -1  # a label outside the classes

# N rows, D columns of one tensor


class MimicTensorsRaw(RawDataSet):
    """The folder of tensors.

    Args:
        source: the folder.
        seed: of the split, where the download has none.

    Raises:
        DataError: a file is missing, no plain tensor, of another length, or a patient is in two
            splits.
    """

    name = "mimic_tensors"
    problem_type = SINGLE_LABEL
    task = BINARY_AUPRC
    label_names = ("alive_after_a_year", "dead_within_a_year")
    license = "MIMIC-IV (PhysioNet credentialed licence); not to be shared"
    notes = (
        "Rows of zeros or of -2 alone are missing; the published loader takes them for complete.",
        "Vectors are standardised by training rows; the published loader uses them as they are.",
    )
    private = True
    groups_apart = True

    def __init__(self, source: Path, *, seed: int = 0) -> None:
        super().__init__(source)
        self.seed = seed
        self.label_path = self.need(LABELS)
        table = read_table(self.label_path, ("subject_id", "one_year_mortality"), as_text=True)
        self.patients = table["subject_id"].fillna("").tolist()
        cells = table["one_year_mortality"].astype("string").str.removesuffix(".0").fillna("")
        self.labels = [{"0": 0, "1": 1, "": None}.get(cell, WRONG) for cell in cells]
        self.values = {name: self._tensor(file) for name, file in FILES.items()}
        self.kinds = dict.fromkeys(FILES, ARRAYS)
        self.forms = dict.fromkeys(FILES, "table")
        self.own_split = not (source / SPLIT_FILE).is_file()
        self.dealt = self._deal()
        self._fit()

    def _tensor(self, file: str) -> np.ndarray:
        """One tensor, read without running anything."""
        path = self.need(file)
        try:
            tensor = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or unsafe file raises nearly anything
            raise DataError(
                f"{path} is no file of a plain tensor ({type(error).__name__}); it is not read, "
                "because a pickle can run any program. Take it from its publisher."
            ) from error
        if not isinstance(tensor, torch.Tensor) or tensor.ndim != 2 or tensor.is_complex():
            raise DataError(f"{path} holds no 2-D tensor of real numbers.")
        if len(tensor) != len(self.patients):
            raise DataError(
                f"{path} has {len(tensor)} rows, {LABELS} has {len(self.patients)}; they must be "
                "in the same order."
            )
        return tensor.float().numpy()

    def _deal(self) -> dict[str, list[int]]:
        """Split -> places of rows."""
        if self.own_split:
            where = [
                split_of(patient, dataset=self.name, shares=SHARES, seed=self.seed)
                for patient in self.patients
            ]
        else:
            where = self._published(self.source / SPLIT_FILE)
        return {split: [n for n, own in enumerate(where) if own == split] for split in SPLITS}

    def _published(self, path: Path) -> list[str]:
        """The split of each row; "" where the file does not name its patient."""
        content = read_json(path, kind=dict)
        split_by: dict[str, str] = {}
        for split, theirs in SPLIT_NAMES.items():
            if not isinstance(content.get(theirs), list):
                raise DataError(f"{path} has no list {theirs!r}.")
            for place, patient in enumerate(map(str, content[theirs]), 1):
                if split_by.setdefault(patient, split) != split:
                    raise DataError(
                        f"{path}: entry {place} of {theirs!r} is in an earlier split too; a "
                        "patient belongs to one split."
                    )
        return [split_by.get(patient, "") for patient in self.patients]

    def _fit(self) -> None:
        """Mean and spread of each column over the training rows that are there."""
        if not self.dealt["train"]:
            raise DataError(
                f"{self.label_path}: none of the {len(self.patients):,} rows is a training row; "
                f"they are of {len(set(self.patients)):,} patients, or {SPLIT_FILE} names none."
            )
        self.scale: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name, values_ND in self.values.items():
            rows_ND = values_ND[self.dealt["train"]].astype(np.float64)
            rows_ND = rows_ND[[not _gap(row) and bool(np.isfinite(row).all()) for row in rows_ND]]
            if not len(rows_ND):
                raise DataError(
                    f"{self.source / FILES[name]}: no training row has a value; take the file that "
                    f"goes with {LABELS}."
                )
            std_D = rows_ND.std(0)
            self.scale[name] = rows_ND.mean(0), np.where(std_D > 1e-6, std_D, 1.0)

    def splits(self) -> tuple[str, ...]:
        """Train, validation and test, by patients."""
        return SPLITS

    def indices(self) -> list[Path]:
        """The labels, and the split where the download has one."""
        return [self.label_path, *([] if self.own_split else [self.source / SPLIT_FILE])]

    def key_files(self) -> list[Path]:
        """The labels: another split keeps the pseudonyms."""
        return [self.label_path]

    @property
    def options(self) -> dict[str, Any]:
        """The seed, where it decided the split."""
        return {"seed": self.seed if self.own_split else None}

    def findings(self) -> dict[str, Any]:
        """Rows that no split has."""
        return {"in no split": len(self.patients) - sum(map(len, self.dealt.values()))}

    def rows(self, split: str) -> Iterator[RawRow]:
        """One row for each line of labels.csv."""
        for n in self.dealt[split]:
            payload = {
                name: (values_ND[n] - self.scale[name][0]) / self.scale[name][1]
                for name, values_ND in self.values.items()
                if not _gap(values_ND[n])
            }
            if self.labels[n] == WRONG:
                yield RawRow(f"row-{n}", fault="wrong label: neither 0 nor 1")
                continue
            if not self.patients[n]:
                yield RawRow(f"row-{n}", fault="no patient is named")
                continue
            bad = [name for name, row_D in payload.items() if not np.isfinite(row_D).all()]
            fault = f"NaN or infinite values in {bad[0]}" if bad else None
            group = f"patient-{self.patients[n]}"
            yield RawRow(f"row-{n}", payload, self.labels[n], group=group, fault=fault)


def _gap(row_D: np.ndarray) -> bool:
    """Whether a row is a mark that nothing is there."""
    return bool((row_D == 0).all() or (row_D == GAP).all())
