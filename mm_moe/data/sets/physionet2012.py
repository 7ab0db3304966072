"""PhysioNet/CinC Challenge 2012: intensive-care stays as a static table and irregular series.

Files: `patients_{a,b}.parquet` and `events_{a,b}.parquet` of sets a and b, 4,000 stays each. Models
are trained on a, a keyed tenth of which is validation, and tested on b. A stay's measurements of
the first 48 hours are events [hours, variable, value]; -1 means "not recorded" and is no value.

SAPS-I, SOFA, length of stay and survival are outcomes or scores of the stay: never inputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mm_moe.data.chance import split_of
from mm_moe.data.events import EventStatistics, event_entry, pack_events
from mm_moe.data.reading import reading
from mm_moe.data.schema import CLINICAL_BINARY, REGRESSION, SINGLE_LABEL
from mm_moe.data.sets.emoji import find_file
from mm_moe.data.sets.patients import (
    PatientData,
    Patients,
    check_choice,
    check_whole,
    table_entry,
    vectors,
)
from mm_moe.data.standardise import CATEGORICAL, NUMERIC, TableEncoder
from mm_moe.errors import ConfigError, DataError

HOURS = 48.0
NOT_RECORDED = -1.0
LARGEST = float(np.finfo(np.float32).max)
MOST_RECORDS = 2**53  # beyond it a float64 tells no two neighbours apart
SHARES = {"train": 0.9, "validation": 0.1}
STATIC = {
    "ICUType": CATEGORICAL,
    "Gender": CATEGORICAL,
    "Age": NUMERIC,
    "Height": NUMERIC,
    "Weight": NUMERIC,
}
LABELS = {  # label -> column, classes, problem type, family of scores
    "death": ("In-hospital_death", ("survived", "died"), SINGLE_LABEL, CLINICAL_BINARY),
    "length_of_stay": ("Length_of_stay", (), REGRESSION, None),
}
LEAKS = ("SAPS-I", "SOFA", "Length_of_stay", "Survival", "In-hospital_death")
TEXTS = ("parameter",)  # columns that hold no numbers
BEDSIDE = (  # what monitors and nurses write down by the hour; all else is of the laboratory
    *("DiasABP", "FiO2", "GCS", "HR", "MAP", "MechVent", "NIDiasABP", "NIMAP", "NISysABP"),
    *("RespRate", "SaO2", "SysABP", "Temp", "Urine", "Weight"),
)


class Physionet2012Data(PatientData):
    """The challenge's sets a and b.

    Args:
        data_dir: folder that holds the four files, or `physionet2012/` with them.
        label: "death" in hospital, or "length_of_stay" in days.
        split_series: three modalities in place of two: the series is parted into the bedside's
            ("vitals") and the laboratory's ("labs"), which more stays lack.
        seed: of the validation part.

    Raises:
        ConfigError: no `data_dir`, or an unknown option.
        DataError: a file is missing, or not in the layout.
    """

    name = "physionet2012"
    license = "PhysioNet/CinC Challenge 2012, ODC-By 1.0"

    def __init__(
        self,
        data_dir: str | None = None,
        *,
        label: str = "death",
        split_series: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(data_dir)
        if self.data_dir is None:
            raise ConfigError("data set 'physionet2012' needs data_dir: a folder with patients_a.")
        check_choice("label", label, [*LABELS], name=self.name)
        check_whole("seed", seed, name=self.name)
        if not isinstance(split_series, bool):
            raise ConfigError(f"physionet2012: split_series ({split_series!r}) is true or false.")
        nested = self.data_dir / "physionet2012"
        folder = nested if nested.is_dir() else self.data_dir
        names = [f"{what}_{part}.parquet" for what in ("patients", "events") for part in "ab"]
        self.paths = [find_file(folder, name) for name in names]
        self.series = ("vitals", "labs") if split_series else ("series",)
        self.modalities = ("static", *self.series)
        self.label, self.seed = label, seed
        self.label_column, self.label_names, self.problem_type, self.task = LABELS[label]
        self.leaks = dict.fromkeys(LEAKS, "an outcome, or a score that doctors gave")

    def read(self) -> Patients:
        """Labels and splits, then the payloads with statistics of the training stays."""
        tables = [_patients(path) for path in self.paths[:2]]
        columns = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
        names = columns.pop("record_id").astype(np.int64).astype(str).tolist()
        if len(set(names)) != len(names):
            raise DataError("physionet2012: a stay is in a and in b, or twice in one of them.")
        in_a = len(tables[0]["record_id"])
        splits: dict[str, list[str]] = {"train": [], "validation": [], "test": names[in_a:]}
        for name in names[:in_a]:
            splits[split_of(name, dataset=self.name, shares=SHARES, seed=self.seed)].append(name)
        train = set(splits["train"])
        static_ND = self._static(columns, np.array([name in train for name in names]))
        events, entries = self._events(train)
        labels = dict(zip(names, map(self._label, columns[self.label_column]), strict=True))
        return Patients(
            splits,
            labels,
            {"static": vectors(names, static_ND), **events},
            sequences=entries,
            array_shapes={"static": table_entry(static_ND.shape[1])},
        )

    def _label(self, value: float) -> int | float | None:
        if np.isnan(value):
            return None
        if self.label == "death" and value not in (0, 1):
            raise DataError(f"physionet2012: a cell of {self.label_column} is neither 0 nor 1.")
        return int(value) if self.label == "death" else float(value)

    def _static(self, columns: dict[str, np.ndarray], train_N: np.ndarray) -> np.ndarray:
        cells = {
            name: columns[name]
            if kind == NUMERIC
            else np.array([None if np.isnan(v) else f"{v:g}" for v in columns[name]], object)
            for name, kind in STATIC.items()
        }
        return TableEncoder(STATIC).fit(cells, train_N).encode(cells)

    def _events(self, train: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Modality -> stay -> events, and the modalities' entries."""
        raw = [_events(path) for path in self.paths[2:]]
        names = sorted(set(raw[0]["names"]) | set(raw[1]["names"]))
        belongs = {
            series: [n for n in names if len(self.series) == 1 or (n in BEDSIDE) == (s == 0)]
            for s, series in enumerate(self.series)
        }
        payloads: dict[str, Any] = {}
        entries: dict[str, Any] = {}
        for series, variables in belongs.items():
            found: dict[str, np.ndarray] = {}
            for part in raw:
                found |= _by_stay(part, variables)
            statistics = EventStatistics(len(variables))
            for stay in sorted(train & set(found)):
                statistics.add(found[stay])
            payloads[series] = {stay: events.tobytes() for stay, events in found.items()}
            entries[series] = event_entry(
                variables,
                statistics=statistics.record(),
                length=max(map(len, found.values()), default=1),
                hours=HOURS,
            )
        return payloads, entries


def _patients(path: Path) -> dict[str, np.ndarray]:
    """Column -> float64 (N,), NaN where not recorded."""
    needed = ["record_id", *STATIC, *LEAKS]
    table = _table(path, needed)
    found = {name: table[name].to_numpy().astype(np.float64) for name in needed}
    numbered = np.abs(found["record_id"]) < MOST_RECORDS
    if not numbered.all() or any((np.abs(v) > LARGEST).any() for v in found.values()):
        raise DataError(f"{path} has rows without record_id, or infinite or too large values.")
    return {
        name: values if name == "record_id" else np.where(values == NOT_RECORDED, np.nan, values)
        for name, values in found.items()
    }


def _events(path: Path) -> dict[str, Any]:
    """The columns of a file of events, without what was not recorded.

    Raises:
        DataError: an event after the window: it could tell the outcome.
    """
    table = _table(path, ["record_id", "minute", "parameter", "value"])
    if any(table[name].null_count for name in ("record_id", "minute", "parameter")):
        raise DataError(f"{path} has events without a stay, a time or a parameter.")
    coded = table["parameter"].combine_chunks()
    coded = coded if pa.types.is_dictionary(coded.type) else coded.dictionary_encode()
    if not pa.types.is_string(coded.dictionary.type):
        raise DataError(f"{path}: the column 'parameter' must hold names.")
    found = {name: table[name].to_numpy() for name in ("record_id", "minute", "value")}
    if not np.isfinite(found["minute"]).all() or (np.abs(found["value"]) > LARGEST).any():
        raise DataError(f"{path} has events with a time or a value that is infinite or too large.")
    late = int((found["minute"] > 60 * HOURS).sum())
    if late or (found["minute"] < 0).any():
        raise DataError(
            f"{path} has {late:,} events after hour {HOURS:g}, or some before hour 0; a model "
            "must not see what comes after the prediction."
        )
    kept = np.isfinite(found["value"]) & (found["value"] != NOT_RECORDED)
    columns = {name: values[kept] for name, values in found.items()}
    codes = coded.indices.to_numpy()[kept]
    return {**columns, "code": codes, "names": coded.dictionary.to_pylist()}


def _by_stay(part: dict[str, Any], variables: list[str]) -> dict[str, np.ndarray]:
    """Stay -> its events of some variables; a stay without any is not there."""
    place_of = {name: place for place, name in enumerate(variables)}
    places = np.array([place_of.get(name, -1) for name in part["names"]], int)[part["code"]]
    kept = np.flatnonzero(places >= 0)
    if not len(kept):
        return {}
    order = kept[np.argsort(part["record_id"][kept], kind="stable")]
    stays, starts = np.unique(part["record_id"][order], return_index=True)
    pieces = np.split(order, starts[1:])
    return {
        str(stay): pack_events(part["minute"][p] / 60, places[p], part["value"][p])
        for stay, p in zip(stays.tolist(), pieces, strict=True)
    }


def _table(path: Path, columns: list[str]) -> pa.Table:
    with reading(str(path)):
        known = pq.read_schema(path).names
        lacking = [name for name in columns if name not in known]
        if lacking:
            raise DataError(f"{path} has no column {', '.join(map(repr, lacking))}.")
        table = pq.read_table(path, columns=columns)
    wrong = [name for name in columns if name not in TEXTS and not _numeric(table[name].type)]
    if wrong:
        raise DataError(f"{path}: the column {wrong[0]!r} holds something else than numbers.")
    return table


def _numeric(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)
