"""Any tables of patients, as a schema file describes them: `prepare_data.py tables`.

The tables are CSV or Parquet files keyed by patient (or by row, of which a patient may have
several). Splits are by patient, statistics are those of the training rows, ids become pseudonyms,
and nothing after the prediction time is an input. What is wrong with the whole (a missing file or
column, a patient in two splits, late events) is an error; what is wrong with a row (its label, an
infinite value, an image of another shape, nothing in it) puts the row into quarantine.

The columns that are used are held in memory; rows are written as they are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mm_moe.data.chance import split_of
from mm_moe.data.prepare.raw import (
    ARRAYS,
    EVENT_LISTS,
    IMAGES,
    SPLITS,
    TEXTS,
    RawDataSet,
    RawRow,
)
from mm_moe.data.prepare.tables_read import (
    EventRows,
    FileCells,
    TableRows,
    read_columns,
    text_cells,
)
from mm_moe.data.prepare.tables_schema import read_schema
from mm_moe.data.schema import (
    CLINICAL_BINARY,
    CLINICAL_CLASSES,
    REGRESSION,
    SINGLE_LABEL,
    SURVIVAL,
)
from mm_moe.data.standardise import plain_numbers
from mm_moe.errors import DataError

KINDS = {
    "table": ARRAYS,
    "events": EVENT_LISTS,
    "text": TEXTS,
    "array": ARRAYS,
    "image": IMAGES,
}
PROBLEMS = {
    "binary": (SINGLE_LABEL, CLINICAL_BINARY),
    "classes": (SINGLE_LABEL, CLINICAL_CLASSES),
    "regression": (REGRESSION, REGRESSION),
    "survival": (SURVIVAL, SURVIVAL),
}


class TablesRaw(RawDataSet):
    """Tables with a schema file.

    Args:
        source: folder with the tables.
        schema: name of the schema file (default: schema.yaml, schema.yml or schema.json).

    Raises:
        DataError: a file or column is missing, the schema contradicts itself, a patient is in two
            splits, or a value is later than the prediction.
    """

    name = "tables"
    notes = (
        "Numeric columns have mean 0 and spread 1 over the training rows; categorical ones are "
        "zeros and ones; NaN is a cell that is not known.",
        "Rows belong to patients; ids are pseudonyms.",
    )
    private = True
    groups_apart = True
    trims_padding = False

    def __init__(self, source: Path, *, schema: str | None = None) -> None:
        super().__init__(source)
        self.path, self.schema = read_schema(source, schema)
        label = self.schema["label"]
        self.problem_type, self.task = PROBLEMS[label["kind"]]
        self.label_names = tuple(label.get("classes", ()))
        self.license = str(self.schema.get("license", "not stated"))
        self.counts: dict[str, int] = {}
        self._read_label(label)
        self._deal()
        about = self.schema["modalities"]
        self.kinds = {name: KINDS[one["kind"]] for name, one in about.items()}
        self.forms = {
            name: one.get("form", "volume") if one["kind"] == "array" else "table"
            for name, one in about.items()
            if one["kind"] in ("array", "table")
        }
        self.parts = {name: self._part(name, one) for name, one in about.items()}
        lists = {name: part for name, part in self.parts.items() if isinstance(part, EventRows)}
        self.variables = {name: part.variables for name, part in lists.items()}
        hours = [part.last_hour for part in lists.values()]
        self.hours = self._window() or max([1.0, *hours])

    def _read_label(self, about: dict[str, Any]) -> None:
        """Keys, patients, labels and prediction times, from the label's file."""
        path = self.need(about["file"])
        patient, row = self.schema["patient"], self.schema.get("row", self.schema["patient"])
        split, time = self.schema["split"].get("column"), self.schema.get("prediction_time")
        hour = time.get("column") if isinstance(time, dict) else None
        names = [n for n in (patient, row, about["column"], about.get("time"), split, hour) if n]
        cells = read_columns(path, list(dict.fromkeys(names)))
        self.keys, self.patients = text_cells(cells[row]), text_cells(cells[patient])
        self.cells = text_cells(cells[about["column"]])
        self.times = text_cells(cells[about["time"]]) if "time" in about else self.cells
        self.split_cells = text_cells(cells[split]) if split else None
        unnamed = sum(
            key is None or p is None for key, p in zip(self.keys, self.patients, strict=True)
        )
        if unnamed:
            raise DataError(f"{path}: {unnamed:,} rows have no {row!r} or no {patient!r}.")
        twice = len(self.keys) - len(set(self.keys))
        if twice:
            raise DataError(
                f"{path} has {twice:,} rows too many for their {row!r}; where a patient has "
                "several rows, name the column that tells them apart as row."
            )
        self.limits = np.full(len(self.keys), np.inf)
        if hour:
            self.limits = plain_numbers(cells[hour].tolist())
            if np.isnan(self.limits).any():
                raise DataError(f"{path}: {hour!r} is no number in some rows; every row needs one.")
        elif time is not None:
            self.limits[:] = float(time)

    def _deal(self) -> None:
        """Split -> numbers of rows, and that no patient is in two splits."""
        about = self.schema["split"]
        if self.split_cells is not None:
            splits = self.split_cells
        else:
            seed, shares = int(about.get("seed", 0)), about["shares"]
            splits = [
                split_of(str(p), dataset=self.name, shares=shares, seed=seed) for p in self.patients
            ]
        strange = sorted({str(split) for split in splits} - set(SPLITS))
        if strange:
            raise DataError(
                f"{self.path}: the column of the split holds {strange[0]!r}; it may hold "
                f"{', '.join(SPLITS)}."
            )
        first: dict[Any, Any] = {}
        pairs = zip(self.patients, splits, strict=True)
        both = {p for p, split in pairs if first.setdefault(p, split) != split}
        if both:
            raise DataError(
                f"{len(both):,} patients have rows in two splits; a patient must be in one split "
                "only, or the scores tell of patients that the model knows."
            )
        self.rows_of = {
            split: [row for row, own in enumerate(splits) if own == split] for split in SPLITS
        }
        if not self.rows_of["train"]:
            raise DataError(f"{self.path}: no row is in the split 'train'.")

    def _part(self, name: str, about: dict[str, Any]) -> Any:
        """What serves a modality's payloads."""
        key = self.schema.get("row", self.schema["patient"])
        path = self.need(about["file"])
        limits = dict(zip(self.keys, self.limits.tolist(), strict=True))
        cut = self.schema.get("late") == "cut"
        if about["kind"] == "table":
            train = {self.keys[row] for row in self.rows_of["train"]}
            return TableRows(path, key, about, train=train, limits=limits, cut=cut)
        if about["kind"] == "events":
            return EventRows(path, key, about, limits=limits, cut=cut)
        return FileCells(path, key, about, limits=limits, cut=cut, folder=self.source)

    def _window(self) -> float:
        """The latest prediction time; 0 where there is none."""
        known = self.limits[np.isfinite(self.limits)]
        return float(known.max()) if len(known) else 0.0

    def splits(self) -> tuple[str, ...]:
        """Those that have rows."""
        return tuple(split for split in SPLITS if self.rows_of[split])

    def indices(self) -> list[Path]:
        """The schema and every table."""
        about = [self.schema["label"], *self.schema["modalities"].values()]
        files = dict.fromkeys(one["file"] for one in about)
        return [self.path, *(self.source / file for file in files)]

    def key_files(self) -> list[Path]:
        """The label's file."""
        return [self.source / self.schema["label"]["file"]]

    def findings(self) -> dict[str, Any]:
        """Columns, counts and leaks; no cell."""
        told: dict[str, Any] = {"columns that are never inputs": self.schema["leaks"]}
        for name, part in self.parts.items():
            told |= {f"{name}: {what}": count for what, count in part.findings().items()}
        return told

    def rows(self, split: str) -> Iterator[RawRow]:
        """The rows of a split, in the order of the label's file."""
        for row in self.rows_of[split]:
            key, group = str(self.keys[row]), str(self.patients[row])
            label = self._label(self.cells[row], self.times[row])
            if isinstance(label, str):
                yield RawRow(key, group=group, fault=label)
                continue
            found = {name: part.payload(self.keys[row]) for name, part in self.parts.items()}
            faults = [value.args[0] for value in found.values() if isinstance(value, ValueError)]
            payload = {name: value for name, value in found.items() if value is not None}
            yield RawRow(key, payload, label, group=group, fault=faults[0] if faults else None)

    def _label(self, cell: str | None, time: str | None) -> Any:
        """The label, None where the cell is empty, or as a text what is wrong with it."""
        if cell is None:
            return None
        if self.problem_type == SURVIVAL:
            days = plain_numbers([time])[0]
            if cell not in ("0", "1") or not np.isfinite(days) or days < 0:
                return "wrong label: no event 0 or 1 with a time of at least 0"
            return [float(days), float(cell)]
        if self.problem_type == REGRESSION:
            value = plain_numbers([cell])[0]
            return float(value) if np.isfinite(value) else "wrong label: no finite number"
        if cell in self.label_names:
            return self.label_names.index(cell)
        return "wrong label: outside the classes"
