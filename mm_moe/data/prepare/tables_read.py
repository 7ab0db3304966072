"""Tables of patients as payloads by key: vectors, events at irregular times, texts and files.

Errors name files, columns and counts, never a cell. Legend: N rows of a table, D columns of its
vectors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from mm_moe.data.events import pack_events
from mm_moe.data.reading import reading
from mm_moe.data.standardise import NUMERIC, TableEncoder
from mm_moe.errors import DataError

EMPTY = ("", "NA", "NaN", "nan", "NULL")
LARGEST = float(np.finfo(np.float32).max)
SHOWN = 40  # columns that a message lists


def read_columns(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Column -> cells (N,), of a CSV file as texts, of a Parquet file as they are.

    Raises:
        DataError: the file cannot be read, or lacks a column.
    """
    with reading(str(path)):
        is_parquet = path.suffix == ".parquet"
        known = pq.read_schema(path).names if is_parquet else pa_csv.open_csv(path).schema.names
        for name in names:
            if name not in known:
                shown = ", ".join(known[:SHOWN]) + (", ..." if len(known) > SHOWN else "")
                raise DataError(f"{path} has no column {name!r}; it has: {shown}.")
        if is_parquet:
            table = pq.read_table(path, columns=list(names))
        else:
            options = pa_csv.ConvertOptions(
                column_types={name: pa.string() for name in names},
                include_columns=list(names),
                null_values=list(EMPTY),
                strings_can_be_null=True,
            )
            table = pa_csv.read_csv(path, convert_options=options)
    return {name: table[name].to_numpy(zero_copy_only=False) for name in names}


def text_cells(cells_N: np.ndarray) -> list[str | None]:
    """Cells as texts; None where empty. A whole number has no decimals, whatever its type."""
    found: list[str | None] = []
    for cell in cells_N.tolist():
        if isinstance(cell, float) and cell.is_integer():
            cell = int(cell)
        text = "" if cell is None or cell != cell else str(cell).strip()
        found.append(None if text in EMPTY else text)
    return found


def number_cells(cells_N: np.ndarray) -> tuple[np.ndarray, int]:
    """Cells as float64 (N,), NaN where empty, and how many were something else than a number."""
    if cells_N.dtype.kind in "fiub":
        return cells_N.astype(np.float64), 0
    found_N, strange = np.full(len(cells_N), np.nan), 0
    for row, text in enumerate(text_cells(cells_N)):
        try:
            found_N[row] = np.nan if text is None else float(text)
        except ValueError:
            strange += 1
    return found_N, strange


class TableRows:
    """One vector for each key.

    Args:
        path: the table.
        key: its column of keys.
        about: its entry in the schema.
        train: keys whose rows give the statistics.
        limits: see `EventRows`.
        cut: see `EventRows`.

    Raises:
        DataError: as `read_columns`; a key is there twice; late rows and `cut` is False.
    """

    def __init__(
        self,
        path: Path,
        key: str,
        about: Mapping[str, Any],
        *,
        train: Collection[Any],
        limits: Mapping[Any, float],
        cut: bool,
    ) -> None:
        columns, timed = about["columns"], about.get("time")
        raw = read_columns(path, list(dict.fromkeys([key, *columns, *([timed] if timed else [])])))
        names = text_cells(raw[key])
        kept_N = np.ones(len(names), bool)
        self.late = 0
        _check_known(path, key, names, limits)
        if timed:
            hours_N = _hours(path, timed, raw[timed])
            keys = np.array(names, dtype=object)
            self.late = _late(path, keys, hours_N, kept_N, limits=limits, cut=cut)
            names = keys[kept_N].tolist()
            raw = {name: cells[kept_N] for name, cells in raw.items()}
        twice = len(names) - len(set(names))
        if twice:
            raise DataError(f"{path} has {twice:,} rows too many for their {key!r}; keep one each.")
        self.strange = 0
        cells: dict[str, np.ndarray] = {}
        for name, kind in columns.items():
            if kind == NUMERIC:
                cells[name], strange = number_cells(raw[name])
                self.strange += strange
            else:
                cells[name] = np.array(text_cells(raw[name]), dtype=object)
        self.infinite_N = np.zeros(len(names), bool)
        for name, kind in columns.items():
            if kind == NUMERIC:
                too_large_N = np.abs(cells[name]) > LARGEST
                self.infinite_N |= too_large_N
                cells[name] = np.where(too_large_N, np.nan, cells[name])
        self.encoder = TableEncoder(columns).fit(cells, np.array([name in train for name in names]))
        self.values_ND = self.encoder.encode(cells)
        self.row_of = {name: row for row, name in enumerate(names)}

    def payload(self, key: Any) -> Any:
        """The vector, None where nothing of it is known, or what is wrong."""
        row = self.row_of.get(key)
        if row is not None and self.infinite_N[row]:
            return ValueError("infinite or too large value in a table")
        if row is None or np.isnan(self.values_ND[row]).all():
            return None
        return self.values_ND[row]

    def findings(self) -> dict[str, Any]:
        """Names of the vector's columns without levels, and counts."""
        told: dict[str, Any] = {"columns": list(self.encoder.kinds)}
        if self.strange:
            told["cells that are no number"] = self.strange
        if self.late:
            told["rows after the prediction"] = self.late
        if self.encoder.unseen:
            told["cells of a level that training lacks"] = sum(self.encoder.unseen.values())
        return told


class EventRows:
    """The events of each key, from a long table (variable, value) or a wide one (columns).

    Args:
        path: the table.
        key: its column of keys.
        about: its entry in the schema.
        limits: key -> the last hour that may be seen.
        cut: leave out what is later, in place of an error.

    Raises:
        DataError: as `read_columns`; a time that is no number; late events and `cut` is False.
    """

    def __init__(
        self,
        path: Path,
        key: str,
        about: Mapping[str, Any],
        *,
        limits: Mapping[Any, float],
        cut: bool,
    ) -> None:
        wide = "columns" in about
        names = list(about["columns"]) if wide else [about["variable"], about["value"]]
        raw = read_columns(path, [key, about["time"], *names])
        keys = np.array(text_cells(raw[key]), dtype=object)
        _check_known(path, key, keys.tolist(), limits)
        hours_N = _hours(path, about["time"], raw[about["time"]])
        if wide:
            columns = [number_cells(raw[name]) for name in names]
            values_N = np.stack([values for values, _ in columns], axis=1).reshape(-1)
            self.strange = sum(strange for _, strange in columns)
            labels = np.tile(np.array(names, dtype=object), len(keys))
            keys, hours_N = np.repeat(keys, len(names)), np.repeat(hours_N, len(names))
        else:
            values_N, self.strange = number_cells(raw[about["value"]])
            labels = np.array(text_cells(raw[about["variable"]]), dtype=object)
        kept_N = ~np.isnan(values_N) & np.array([label is not None for label in labels], bool)
        self.late = _late(path, keys, hours_N, kept_N, limits=limits, cut=cut)
        keys, hours_N, values_N, labels = (a[kept_N] for a in (keys, hours_N, values_N, labels))
        self.variables = tuple(names) if wide else tuple(sorted(set(labels.tolist())))
        place_of = {name: place for place, name in enumerate(self.variables)}
        self.places_N = np.array([place_of[label] for label in labels], np.int32)
        self.hours_N, self.values_N = hours_N.astype(np.float32), values_N.astype(np.float32)
        self.last_hour = float(hours_N.max()) if len(hours_N) else 0.0
        self.rows_of = _by_key(keys)

    def payload(self, key: Any) -> np.ndarray | None:
        """Float32 (T, 3), or None without an event."""
        rows = self.rows_of.get(key)
        if rows is None:
            return None
        return pack_events(self.hours_N[rows], self.places_N[rows], self.values_N[rows])

    def findings(self) -> dict[str, Any]:
        """Counts."""
        told = {"values that are no number": self.strange, "events after the prediction": self.late}
        return {what: count for what, count in told.items() if count}


class FileCells:
    """One text, or one file named in a cell, for each key; of several the latest.

    Args:
        path: the table.
        key: its column of keys.
        about: its entry in the schema.
        limits: see `EventRows`.
        cut: see `EventRows`.
        folder: where the files' names start from.
    """

    def __init__(
        self,
        path: Path,
        key: str,
        about: Mapping[str, Any],
        *,
        limits: Mapping[Any, float],
        cut: bool,
        folder: Path,
    ) -> None:
        timed = about.get("time")
        raw = read_columns(path, [key, about["column"], *([timed] if timed else [])])
        keys = np.array(text_cells(raw[key]), dtype=object)
        _check_known(path, key, keys.tolist(), limits)
        hours_N = _hours(path, timed, raw[timed]) if timed else np.zeros(len(keys))
        cells = text_cells(raw[about["column"]])
        kept_N = np.array([cell is not None for cell in cells], bool)
        self.late = _late(path, keys, hours_N, kept_N, limits=limits, cut=cut) if timed else 0
        self.kind, self.folder = about["kind"], folder
        self.cell_of: dict[Any, str | None] = {}
        for row in np.argsort(hours_N, kind="stable").tolist():
            if kept_N[row]:
                self.cell_of[keys[row]] = cells[row]

    def payload(self, key: Any) -> Any:
        """A text, the path of an image, an array, or what is wrong."""
        cell = self.cell_of.get(key)
        if cell is None or self.kind == "text":
            return cell
        if "\0" in cell:  # no file system takes it
            return ValueError("a file's name with a zero byte")
        path = (self.folder / cell).resolve()
        if not path.is_relative_to(self.folder.resolve()):
            return ValueError("a file outside the folder of the data")
        if self.kind == "image":
            return path
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            return ValueError(f"array file cannot be read: {type(error).__name__}")

    def findings(self) -> dict[str, Any]:
        """Counts."""
        return {"rows after the prediction": self.late} if self.late else {}


def _check_known(path: Path, key: str, names: Collection[Any], limits: Mapping[Any, float]) -> None:
    """Refuse a table of which no row is of a row of the label's file: its keys are others."""
    if names and limits.keys().isdisjoint(names):
        raise DataError(
            f"{path}: none of its {len(names):,} rows has a {key!r} that the label's file has; "
            "take the table of the same rows, with ids that are spelt alike."
        )


def _hours(path: Path, column: str, cells_N: np.ndarray) -> np.ndarray:
    """A column of times, every one a number."""
    hours_N, strange = number_cells(cells_N)
    if strange or np.isnan(hours_N).any():
        raise DataError(f"{path}: {column!r} is no number in some rows; times are in hours.")
    return hours_N


def _late(
    path: Path,
    keys: np.ndarray,
    hours_N: np.ndarray,
    kept_N: np.ndarray,
    *,
    limits: Mapping[Any, float],
    cut: bool,
) -> int:
    """Take late rows and those of unknown keys from `kept_N`; how many were late."""
    limit_N = np.array([limits.get(key, -np.inf) for key in keys.tolist()])
    late_N = kept_N & (hours_N > limit_N) & np.isfinite(limit_N)
    late = int(late_N.sum())
    if late and not cut:
        raise DataError(
            f"{path} has {late:,} values after the prediction time; a model must not see what "
            "comes after it. Leave them out, or set late: cut."
        )
    kept_N &= ~late_N & (limit_N != -np.inf)
    return late


def _by_key(keys: np.ndarray) -> dict[Any, np.ndarray]:
    """Key -> its rows."""
    if not len(keys):
        return {}
    found, codes = np.unique(keys.astype(str), return_inverse=True)
    order = np.argsort(codes, kind="stable")
    pieces = np.split(order, np.cumsum(np.bincount(codes))[:-1])
    return dict(zip(found.tolist(), pieces, strict=True))
