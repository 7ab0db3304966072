"""Hospital stays of relational exports: what is known some hours after admission, and the outcome.

A row is one stay. Its inputs are what the tables know up to the prediction time, `hours` after the
stay began: a static table, irregular series of events, codes, notes. A stay that ended by then is
left out, since its outcome is no prediction; an event that was measured or stored later is cut and
counted. Outcomes (death, discharge, length of stay) are never inputs.

Patients are dealt to the splits by a keyed hash of their id, so that all stays of one are together.

E events of a chunk, S stays.
"""

from __future__ import annotations

import collections
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mm_moe.batch import TEXT
from mm_moe.data.chance import split_of
from mm_moe.data.prepare.encoding import TableEncoder, text_cells
from mm_moe.data.prepare.hospital_store import EventStore, NoteStore
from mm_moe.data.prepare.raw import ARRAYS, EVENT_LISTS, SPLITS, TEXTS, RawDataSet, RawRow
from mm_moe.data.schema import BINARY_AUPRC, SINGLE_LABEL
from mm_moe.errors import ConfigError, DataError
from mm_moe.registry import nearest

SHARES = {"train": 0.7, "validation": 0.15, "test": 0.15}
LABELS = {"mortality": ("survived", "died"), "los": ("7_days_or_less", "over_7_days")}
LONG_STAY_DAYS = 7
OLDEST = 90.0  # exports hide the age of older patients
BUSY = "events"  # of the counts
STAY, PATIENT = "stay-", "patient-"  # what keys begin with; alone they name nothing


@dataclass
class Stays:
    """The stays of a download.

    Attributes:
        table: one line per stay: key, patient (texts), start (a time, or NaT where the export has
            offsets), days (length of stay, NaN where its times are no times), died, age, and the
            columns of `static`.
        static: columns of the static table besides the age.
    """

    table: pd.DataFrame
    static: tuple[str, ...]


@dataclass(frozen=True)
class Chunk:
    """Some lines of an event table.

    Attributes:
        stay_E: places of stays, -1 for lines of others.
        item_E: what was measured, as text.
        hours_E: since the stay began; NaN where the line has no time.
        value_E: the number; NaN where there is none.
        known_E: hours when the value was in the records.
    """

    stay_E: np.ndarray
    item_E: np.ndarray
    hours_E: np.ndarray
    value_E: np.ndarray
    known_E: np.ndarray


class HospitalRaw(RawDataSet):
    """A relational export.

    Args:
        source: the folder.
        label: mortality (death in hospital) or los (a stay of more than 7 days).
        hours: of observation; the prediction is made at their end.
        seed: of the split.
        min_age: stays of younger patients are left out.
        min_stays: a variable or code that fewer training stays have is left out.
        max_variables: of each series, those that most stays have.
        max_note_chars: the last characters of a stay's notes that are kept.
        chunk_rows: lines of a large table in memory at once.

    Raises:
        ConfigError: an option that cannot be.
        DataError: a table is missing, damaged, or lacks a column.
    """

    problem_type = SINGLE_LABEL
    task = BINARY_AUPRC
    private = True
    groups_apart = True
    notes = (
        "Inputs end at the prediction time; later events are cut and counted.",
        "Stays that ended before the prediction time are left out and counted.",
        "Patients are split by a keyed hash: all stays of one are in one split.",
        "Values are in the units of the export; implausible ones are not removed.",
    )
    series: tuple[str, ...] = ()  # modalities of events that the layout has

    def __init__(
        self,
        source: Path,
        *,
        label: str = "mortality",
        hours: float = 48.0,
        seed: int = 0,
        min_age: float = 18.0,
        min_stays: int = 10,
        max_variables: int = 200,
        max_note_chars: int = 20_000,
        chunk_rows: int = 200_000,
    ) -> None:
        super().__init__(source)
        if label not in LABELS:
            raise ConfigError(f"{self.name}: unknown label {label!r}; {nearest(label, [*LABELS])}")
        for name, value in {
            **{"hours": hours, "min_stays": min_stays, "max_variables": max_variables},
            **{"max_note_chars": max_note_chars, "chunk_rows": chunk_rows},
        }.items():
            if not value > 0:
                raise ConfigError(f"{self.name}: {name} ({value}) must be above 0.")
        if label == "los" and hours >= 24 * LONG_STAY_DAYS:
            raise ConfigError(f"{self.name}: after {hours:g} hours a stay of 7 days is over.")
        self.label, self.hours, self.seed = label, float(hours), seed
        self.min_age, self.min_stays, self.max_variables = min_age, min_stays, max_variables
        self.max_note_chars, self.chunk_rows = max_note_chars, chunk_rows
        self.label_names = LABELS[label]
        self.counts: collections.Counter[str] = collections.Counter()
        self._take(self.read_stays())
        self._read_series()
        self._read_notes()
        self._read_codes()

    # --- what a layout says -------------------------------------------------------------------

    @abstractmethod
    def read_stays(self) -> Stays:
        """All stays of the download."""

    @abstractmethod
    def read_events(self, series: str) -> Iterator[Chunk]:
        """The lines of the tables of one series; nothing where the download lacks them."""

    def read_notes(self) -> Iterator[tuple[np.ndarray, np.ndarray, list[str]]]:
        """Chunks of (places of stays or -1, hours when the note was there, texts)."""
        return iter(())

    def read_codes(self) -> Iterator[tuple[int, str]]:
        """(place of a stay, code that was known at the prediction time)."""
        return iter(())

    # --- what they all do ---------------------------------------------------------------------

    def _take(self, stays: Stays) -> None:
        """Keep the stays that a prediction can be made for, in the order of the splits."""
        table = stays.table
        repeated = np.flatnonzero(table["key"].duplicated().to_numpy())
        if len(repeated):
            raise DataError(
                f"{self.name}: {len(repeated)} stays are named twice, the first in line "
                f"{repeated[0] + 2}; a stay has one line."
            )
        unnamed = table["key"].eq(STAY) | table["patient"].eq(PATIENT)
        bad = table["days"].isna() | (table["days"] < 0) | table["died"].isna() | unnamed
        young = ~bad & (table["age"] < self.min_age)
        short = ~bad & ~young & (table["days"] * 24 <= self.hours)
        self.counts["stays of patients under min_age"] = int(young.sum())
        self.counts["stays that ended before the prediction time"] = int(short.sum())
        table = table[~young & ~short].copy()
        table["split"] = [
            split_of(patient, dataset=self.name, shares=SHARES, seed=self.seed)
            for patient in table["patient"]
        ]
        order = {split: place for place, split in enumerate(SPLITS)}
        table = table.sort_values(
            ["split", "patient", "key"], key=lambda c: c.map(order) if c.name == "split" else c
        ).reset_index(drop=True)
        if not (table["split"] == "train").any():
            raise DataError(
                f"{self.name}: of {len(stays.table):,} stays no training stay lasts over "
                f"{self.hours:g} hours; take fewer hours by --options, or a whole download."
            )
        self.stays = table
        self.place_of = {key: place for place, key in enumerate(table["key"])}
        self.stays["fault"] = _faults(table)
        self.train_S = ((table["split"] == "train") & self.stays["fault"].isna()).to_numpy()
        cells = text_cells(table[["age", *stays.static]])
        encoder = TableEncoder(cells[self.train_S])
        self.static_SD, self.static_record = encoder.encode(cells), encoder.record()
        self.kinds, self.forms = {"static": ARRAYS}, {"static": "table"}

    def _read_series(self) -> None:
        """Every series that some training stay has."""
        self.stores: dict[str, EventStore] = {}
        for series in self.series:
            store = EventStore(self.train_S)
            for chunk in self.read_events(series):
                store.add(*self._window(chunk, series))
            store.settle(min_stays=self.min_stays, max_variables=self.max_variables)
            if store.variables:
                self.stores[series] = store
                self.kinds[series] = EVENT_LISTS
        self.variables = {name: store.variables for name, store in self.stores.items()}

    def _window(self, chunk: Chunk, series: str) -> tuple[np.ndarray, ...]:
        """The events of our stays up to the prediction time; the rest is counted."""
        left_E = chunk.stay_E >= 0
        self.counts[f"{series} {BUSY} of other stays"] += int((~left_E).sum())
        for why, bad_E in (
            ("without a time", ~np.isfinite(chunk.hours_E)),
            ("without a number", ~np.isfinite(chunk.value_E)),
            ("before the stay", chunk.hours_E < 0),
            ("after the prediction time", chunk.hours_E > self.hours),
            ("stored after the prediction time", chunk.known_E > self.hours),
        ):
            self.counts[f"{series} {BUSY} {why}"] += int((left_E & bad_E).sum())
            left_E &= ~bad_E
        self.counts[f"{series} {BUSY} kept"] += int(left_E.sum())
        return tuple(
            part[left_E] for part in (chunk.stay_E, chunk.item_E, chunk.hours_E, chunk.value_E)
        )

    def _read_notes(self) -> None:
        self.note_store: NoteStore | None = None
        trained = False  # a modality that no training stay has teaches nothing
        for stays, hours, texts in self.read_notes():
            left = (stays >= 0) & (hours <= self.hours)
            self.counts["notes after the prediction time"] += int(((stays >= 0) & ~left).sum())
            if left.any():
                self.note_store = self.note_store or NoteStore()
                chosen = [text for text, keep in zip(texts, left, strict=True) if keep]
                self.note_store.add(stays[left], hours[left], chosen)
                trained |= bool(self.train_S[stays[left]].any())
        if not trained:
            self.note_store = None
        if self.note_store:
            self.kinds[TEXT] = TEXTS

    def _read_codes(self) -> None:
        """Codes that enough training stays have, as zeros and ones."""
        stays_of: dict[str, set[int]] = {}
        for stay, code in self.read_codes():
            stays_of.setdefault(code, set()).add(stay)
        enough = {
            code
            for code, stays in stays_of.items()
            if self.train_S[sorted(stays)].sum() >= self.min_stays
        }
        kept = sorted(enough)
        self.codes: dict[int, list[int]] = {}
        for place, code in enumerate(kept):
            for stay in stays_of[code]:
                self.codes.setdefault(stay, []).append(place)
        self.num_codes = len(kept)
        self.counts["codes left out as too rare"] = len(stays_of) - len(kept)
        if kept:
            self.kinds["codes"], self.forms = ARRAYS, {**self.forms, "codes": "table"}

    def places(self, keys: pd.Series) -> np.ndarray:
        """Places of the stays with these keys, -1 for others."""
        return keys.map(self.place_of).fillna(-1).to_numpy(np.int64)

    def splits(self) -> tuple[str, ...]:
        """Train, validation and test, by patients."""
        return SPLITS

    @property
    def options(self) -> dict[str, Any]:
        """The options as they were taken."""
        names = ("label", "hours", "seed", "min_age", "min_stays", "max_variables")
        return {name: getattr(self, name) for name in names}

    def findings(self) -> dict[str, Any]:
        """Counts, and the columns of the static table."""
        told: dict[str, Any] = {what: count for what, count in self.counts.items() if count}
        told["modalities not there"] = [name for name in self.series if name not in self.stores]
        for series, store in self.stores.items():
            told[f"{series} variables left out"] = store.left_out
        return told | {"static": self.static_record}

    def rows(self, split: str) -> Iterator[RawRow]:
        """One row for each stay."""
        for place, stay in enumerate(self.stays.itertuples()):
            if stay.split != split:
                continue
            if not pd.isna(stay.fault):
                yield RawRow(stay.key, fault=stay.fault)
                continue
            over = stay.days > LONG_STAY_DAYS
            label = int(stay.died if self.label == "mortality" else over)
            yield RawRow(stay.key, self._payload(place), label, group=stay.patient)

    def _payload(self, place: int) -> dict[str, Any]:
        payload: dict[str, Any] = {"static": self.static_SD[place]}
        for series, store in self.stores.items():
            events = store.get(place)
            if events is not None:
                payload[series] = events
        if self.note_store:
            payload[TEXT] = self.note_store.get(place, max_chars=self.max_note_chars)
        if place in self.codes:
            found = np.zeros(self.num_codes, np.uint8)
            found[self.codes[place]] = 1
            payload["codes"] = found
        return payload


def _faults(table: pd.DataFrame) -> pd.Series:
    """What is wrong with each stay's line; None for a good one."""
    faults = pd.Series(None, index=table.index, dtype=object)
    faults[table["died"].isna()] = "wrong label: no outcome that the layout knows"
    faults[~table["days"].ge(0)] = "times of the stay are missing or out of order"
    faults[table["patient"].eq(PATIENT)] = "no patient is named"
    faults[table["key"].eq(STAY)] = "no stay is named"
    return faults
