"""MIMIC-III and MIMIC-IV as their relational exports (CSV or CSV.gz, plain or as the demos).

MIMIC-III: patients, admissions, d_items, d_labitems, and what there is of chartevents, labevents,
diagnoses_icd, noteevents, all in one folder. MIMIC-IV: `hosp/` (patients, admissions, labevents,
d_labitems, diagnoses_icd), `icu/` (chartevents, d_items), `note/` (radiology).

A stay is a hospital admission. Diagnoses are coded after discharge, so only those of earlier
admissions of the patient are inputs (the first three characters of the code); discharge summaries
never are. Laboratory values without an admission are those of the admission whose window they fall
into. A note with a date but no time counts from the end of its day.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from mm_moe.data.prepare.csv_tables import find_table, read_chunks, read_table
from mm_moe.data.prepare.hospital import OLDEST, Chunk, HospitalRaw, Stays
from mm_moe.errors import DataError

TIMES = ("admittime", "dischtime")
STATIC = ("gender", "admission_type", "admission_location", "insurance")
EVENTS = ("subject_id", "hadm_id", "itemid", "charttime", "valuenum")
TABLES = {"vitals": ("chartevents", "d_items"), "labs": ("labevents", "d_labitems")}
ROLLED = 3  # characters of a diagnosis code
HOUR = pd.Timedelta(hours=1)


class MimicRaw(HospitalRaw):
    """What both versions share; see `HospitalRaw` for the options."""

    series = ("vitals", "labs")
    folders: tuple[str, ...] = ("",)
    note_table = ""
    icd: tuple[str, ...] = ()

    def table(self, name: str, *, needed: bool = True) -> Path | None:
        """The file of a table.

        Raises:
            DataError: it is needed and not there.
        """
        path = find_table(self.source, name, folders=self.folders)
        if path is None and needed:
            raise DataError(
                f"{str(self.source)!r} is not in the layout of {self.name!r}: there is no "
                f"{name}.csv or {name}.csv.gz; see the docstring of {__name__}."
            )
        return path

    def indices(self) -> list[Path]:
        """Patients and admissions."""
        return [Path(str(self.table(name))) for name in ("patients", "admissions")]

    def read_stays(self) -> Stays:
        """Admissions with the age of their patient."""
        patients, admissions = (str(path) for path in self.indices())
        people = read_table(Path(patients), self.patient_columns, as_text=True)
        needed = ("subject_id", "hadm_id", *TIMES, "hospital_expire_flag", *STATIC[1:])
        table = read_table(Path(admissions), needed, as_text=True)
        strangers = ~table["subject_id"].isin(people["subject_id"])
        if len(table) and strangers.all():
            raise DataError(
                f"{admissions} and {patients} have no patient in common; both must be of one "
                "download."
            )
        self.counts["stays without a line of their patient"] = int(strangers.sum())
        table = table.merge(people.drop_duplicates("subject_id"), on="subject_id", how="left")
        start, end = (_times(table[name]) for name in TIMES)
        flag = table["hospital_expire_flag"].map({"0": False, "1": True})
        stays = pd.DataFrame(
            {
                "key": "stay-" + table["hadm_id"].fillna("").astype(str),
                "patient": "patient-" + table["subject_id"].fillna("").astype(str),
                "start": start,
                "days": (end - start) / pd.Timedelta(days=1),
                "died": flag.astype(object),
                "age": self.ages(table, start),
                **{name: table[name] for name in STATIC},
            }
        )
        self._history(stays)
        return Stays(stays, STATIC)

    patient_columns: tuple[str, ...] = ()

    def ages(self, table: pd.DataFrame, start: pd.Series) -> pd.Series:
        """Years at admission."""
        raise NotImplementedError

    def _history(self, stays: pd.DataFrame) -> None:
        """Who was admitted when: lines without an admission, and earlier codes, need it."""
        self.history = stays[["key", "patient", "start", "days"]].copy()

    def read_events(self, series: str) -> Iterator[Chunk]:
        """The lines of chartevents or labevents, as they come."""
        name, dictionary = TABLES[series]
        path = self.table(name, needed=False)
        if path is None:
            return
        labels = self._labels(dictionary)
        start_S = self.stays["start"].to_numpy()
        for frame in read_chunks(
            path, EVENTS, optional=("storetime", "error"), chunk_rows=self.chunk_rows
        ):
            if "error" in frame:
                wrong = frame["error"] == 1
                self.counts[f"{series} events marked as errors"] += int(wrong.sum())
                frame = frame[~wrong]
            when = _times(frame["charttime"])
            stay_E = self._stays_of(frame, when)
            start_E = pd.Series(start_S[np.maximum(stay_E, 0)], index=frame.index)
            hours_E = ((when - start_E) / HOUR).to_numpy()
            known_E = hours_E
            if "storetime" in frame:
                known_E = ((_times(frame["storetime"]) - start_E) / HOUR).fillna(-1.0).to_numpy()
            values_E = pd.to_numeric(frame["valuenum"], errors="coerce").to_numpy(np.float64)
            items_E = _numbers(frame["itemid"]).map(lambda n: labels.get(n, n)).to_numpy(str)
            yield Chunk(stay_E, items_E, hours_E, values_E, known_E)

    def _labels(self, dictionary: str) -> dict[str, str]:
        """Item -> its name with its number."""
        path = self.table(dictionary, needed=False)
        if path is None:
            return {}
        table = read_table(path, ("itemid", "label"), as_text=True)
        return {
            number: f"{label} ({number})" if isinstance(label, str) else number
            for number, label in zip(table["itemid"], table["label"], strict=True)
        }

    def _stays_of(self, frame: pd.DataFrame, when: pd.Series) -> np.ndarray:
        """Places of the stays of lines; by patient and time where a line names no admission."""
        stay_E = self.places("stay-" + _numbers(frame["hadm_id"]))
        lost = frame["hadm_id"].isna().to_numpy()
        if lost.any():
            lines = pd.DataFrame(
                {
                    "line": np.flatnonzero(lost),
                    "patient": ("patient-" + _numbers(frame["subject_id"])).to_numpy()[lost],
                    "when": when.to_numpy()[lost],
                }
            )
            joined = lines.merge(self.history, on="patient")
            since = joined["when"] - joined["start"]
            inside = (since >= pd.Timedelta(0)) & (since <= pd.to_timedelta(joined["days"], "D"))
            joined = joined[inside].drop_duplicates("line")
            stay_E[joined["line"].to_numpy()] = self.places(joined["key"])
        return stay_E

    def read_codes(self) -> Iterator[tuple[int, str]]:
        """Rolled-up diagnosis codes of admissions that had ended when the stay began."""
        path = self.table("diagnoses_icd", needed=False)
        if path is None:
            return
        table = read_table(path, ("hadm_id", *self.icd), as_text=True).dropna()
        codes = table[self.icd[-1]].str.strip().str[:ROLLED]
        versions = table[self.icd[0]] + ":" if len(self.icd) > 1 else "9:"
        coded = pd.DataFrame({"key": "stay-" + table["hadm_id"], "code": versions + codes})
        past = coded.merge(self.history, on="key")
        past["end"] = past["start"] + pd.to_timedelta(past["days"], "D")
        ours = self.stays[["key", "patient", "start"]]
        pairs = past[["patient", "code", "end"]].merge(ours, on="patient")
        pairs = pairs[pairs["end"] <= pairs["start"]].drop_duplicates(["key", "code"])
        yield from ((self.place_of[k], c) for k, c in zip(pairs["key"], pairs["code"], strict=True))

    def read_notes(self) -> Iterator[tuple[np.ndarray, np.ndarray, list[str]]]:
        """Notes but discharge summaries, each from when it was in the records."""
        path = self.table(self.note_table, needed=False)
        if path is None:
            return
        optional = ("chartdate", "storetime", "category", "iserror")
        for frame in read_chunks(
            path,
            ("hadm_id", "charttime", "text"),
            optional=optional,
            chunk_rows=max(1, self.chunk_rows // 100),
            as_text=True,
        ):
            frame = frame[frame["text"].notna()]
            if "category" in frame:
                summary = frame["category"].str.contains("discharge", case=False, na=False)
                self.counts["discharge summaries left out"] += int(summary.sum())
                frame = frame[~summary]
            if "iserror" in frame:
                frame = frame[frame["iserror"] != "1"]
            when = _times(frame["charttime"])
            if "chartdate" in frame:
                when = when.fillna(_days(frame["chartdate"]) + pd.Timedelta(days=1))
            if "storetime" in frame:
                when = _times(frame["storetime"]).fillna(when)
            stays = self.places("stay-" + _numbers(frame["hadm_id"]))
            start = pd.Series(self.stays["start"].to_numpy()[np.maximum(stays, 0)], frame.index)
            hours = ((when - start) / HOUR).fillna(np.inf).to_numpy()
            yield stays, hours, frame["text"].tolist()


class Mimic3Raw(MimicRaw):
    """MIMIC-III; see `HospitalRaw` for the options."""

    name = "mimic3"
    license = "MIMIC-III Clinical Database (PhysioNet credentialed licence), or its demo (ODbL 1.0)"
    note_table = "noteevents"
    icd = ("icd9_code",)
    patient_columns = ("subject_id", "gender", "dob")

    def ages(self, table: pd.DataFrame, start: pd.Series) -> pd.Series:
        """From the date of birth, which lies 300 years back for patients over 89."""
        born = _days(table["dob"])  # a difference of 300 years does not fit into nanoseconds
        years = start.dt.year - born.dt.year + (start.dt.dayofyear - born.dt.dayofyear) / 365.25
        return years.clip(upper=OLDEST)


class Mimic4Raw(MimicRaw):
    """MIMIC-IV; see `HospitalRaw` for the options."""

    name = "mimic4"
    license = "MIMIC-IV (PhysioNet credentialed licence), or its demo (ODbL 1.0)"
    folders = ("hosp", "icu", "note", "")
    note_table = "radiology"
    icd = ("icd_version", "icd_code")
    patient_columns = ("subject_id", "gender", "anchor_age", "anchor_year")

    def ages(self, table: pd.DataFrame, start: pd.Series) -> pd.Series:
        """The age in the patient's anchor year, and the years since."""
        anchor = pd.to_numeric(table["anchor_age"], errors="coerce")
        year = pd.to_numeric(table["anchor_year"], errors="coerce")
        return (anchor + start.dt.year - year).clip(upper=OLDEST)


def _times(cells: pd.Series) -> pd.Series:
    """Times to the second; NaT where a cell is none."""
    if pd.api.types.is_numeric_dtype(cells):  # read as numbers, which no time is
        return pd.Series(pd.NaT, index=cells.index)
    return pd.to_datetime(cells, format="%Y-%m-%d %H:%M:%S", errors="coerce")


def _days(cells: pd.Series) -> pd.Series:
    """Dates, with or without a time."""
    return pd.to_datetime(cells.astype("string").str[:10], format="%Y-%m-%d", errors="coerce")


def _numbers(cells: pd.Series) -> pd.Series:
    """Ids as texts; 12.0, as pandas reads a column with gaps, is "12", a gap is empty."""
    return cells.astype("string").str.removesuffix(".0").fillna("").astype(object)
