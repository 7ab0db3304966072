"""eICU as its relational export (CSV or CSV.gz, the whole or the demo), all in one folder.

patient, and what there is of vitalPeriodic, vitalAperiodic, lab, diagnosis, note; letter case does
not matter. A stay is the first stay in an intensive-care unit of a hospital admission; all times
are minutes since it began. Diagnoses count if they were entered before the prediction time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from mm_moe.data.prepare.csv_tables import find_table, read_chunks, read_table
from mm_moe.data.prepare.hospital import OLDEST, Chunk, HospitalRaw, Stays
from mm_moe.errors import DataError

STATIC = ("gender", "unittype", "unitadmitsource", "admissionheight", "admissionweight")
NEEDED = (
    *("patientunitstayid", "uniquepid", "age", "unitvisitnumber", "hospitaldischargeoffset"),
    *("hospitaldischargestatus", *STATIC),
)
STAY = "patientunitstayid"
VITALS = {  # table -> columns of measurements
    "vitalperiodic": (
        *("temperature", "sao2", "heartrate", "respiration", "cvp", "etco2", "systemicsystolic"),
        *("systemicdiastolic", "systemicmean", "pasystolic", "padiastolic", "pamean", "icp"),
    ),
    "vitalaperiodic": ("noninvasivesystolic", "noninvasivediastolic", "noninvasivemean"),
}
DAY = 24 * 60  # minutes


class EicuRaw(HospitalRaw):
    """eICU; see `HospitalRaw` for the options. The length of stay is that in hospital
    since the stay in the unit began: days before it would tell the label.
    """

    name = "eicu"
    license = "eICU Collaborative Research Database (PhysioNet credentialed licence), or its demo"
    series = ("vitals", "labs")

    def indices(self) -> list[Path]:
        """The table of patients."""
        path = find_table(self.source, "patient")
        if path is None:
            raise DataError(
                f"{str(self.source)!r} is not in the layout of 'eicu': there is no patient.csv or "
                f"patient.csv.gz; see the docstring of {__name__}."
            )
        return [path]

    def read_stays(self) -> Stays:
        """First unit stays; those of later visits are counted."""
        table = read_table(self.indices()[0], NEEDED, as_text=True)
        first = table["unitvisitnumber"].map(_number) == 1
        self.counts["later unit stays of one admission"] = int((~first).sum())
        table = table[first].reset_index(drop=True)
        left = table["hospitaldischargeoffset"].map(_number)
        status = table["hospitaldischargestatus"].map({"Alive": False, "Expired": True})
        stays = pd.DataFrame(
            {
                "key": "stay-" + table[STAY].fillna(""),
                "patient": "patient-" + table["uniquepid"].fillna(""),
                "start": pd.NaT,
                "days": left / DAY,
                "died": status.astype(object),
                "age": table["age"].replace("> 89", str(OLDEST)).map(_number),
                **{name: table[name] for name in STATIC},
            }
        )
        return Stays(stays, STATIC)

    def read_events(self, series: str) -> Iterator[Chunk]:
        """Long tables as they are, wide ones column after column."""
        if series == "labs":
            yield from self._labs()
            return
        for name, columns in VITALS.items():
            path = find_table(self.source, name)
            if path is None:
                continue
            needed = (STAY, "observationoffset")
            for frame in read_chunks(path, needed, optional=columns, chunk_rows=self.chunk_rows):
                for column in (column for column in columns if column in frame):
                    measured = frame[frame[column].notna()]
                    yield self._chunk(
                        measured, column, measured["observationoffset"], measured[column]
                    )

    def _labs(self) -> Iterator[Chunk]:
        path = find_table(self.source, "lab")
        if path is None:
            return
        needed = (STAY, "labresultoffset", "labname", "labresult")
        late = "labresultrevisedoffset"
        for frame in read_chunks(path, needed, optional=(late,), chunk_rows=self.chunk_rows):
            known = frame.get(late)
            yield self._chunk(
                frame, frame["labname"], frame["labresultoffset"], frame["labresult"], known=known
            )

    def _chunk(
        self,
        frame: pd.DataFrame,
        item: str | pd.Series,
        minutes: pd.Series,
        values: pd.Series,
        *,
        known: pd.Series | None = None,
    ) -> Chunk:
        hours_E = _hours(minutes)
        known_E = hours_E if known is None else np.nan_to_num(_hours(known), nan=-1.0)
        items = pd.Series(item, index=frame.index).fillna("unnamed").astype(str)
        return Chunk(
            self.places("stay-" + frame[STAY].astype(str)),
            items.to_numpy(str),
            hours_E,
            pd.to_numeric(values, errors="coerce").to_numpy(np.float64),
            known_E,
        )

    def read_codes(self) -> Iterator[tuple[int, str]]:
        """The first part of each diagnosis that was entered in time."""
        path = find_table(self.source, "diagnosis")
        if path is None:
            return
        needed = (STAY, "diagnosisoffset", "diagnosisstring")
        for frame in read_chunks(path, needed, chunk_rows=self.chunk_rows):
            frame = frame[frame["diagnosisstring"].notna()]
            stays = self.places("stay-" + frame[STAY].astype(str))
            late = ~(_hours(frame["diagnosisoffset"]) <= self.hours)
            self.counts["diagnoses after the prediction time"] += int((late & (stays >= 0)).sum())
            codes = frame["diagnosisstring"].astype(str).str.split("|").str[:2].str.join("|")
            for stay, code, too_late in zip(stays, codes, late, strict=True):
                if stay >= 0 and not too_late:
                    yield int(stay), code

    def read_notes(self) -> Iterator[tuple[np.ndarray, np.ndarray, list[str]]]:
        """Texts of the table note."""
        path = find_table(self.source, "note")
        if path is None:
            return
        needed = (STAY, "noteoffset", "notetext")
        rows = max(1, self.chunk_rows // 100)
        for frame in read_chunks(path, needed, chunk_rows=rows, as_text=True):
            frame = frame[frame["notetext"].notna()]
            hours = np.nan_to_num(_hours(frame["noteoffset"]), nan=np.inf)
            yield self.places("stay-" + frame[STAY]), hours, frame["notetext"].tolist()


def _hours(minutes: pd.Series) -> np.ndarray:
    return pd.to_numeric(minutes, errors="coerce").to_numpy(np.float64) / 60


def _number(cell: object) -> float:
    return float(pd.to_numeric(str(cell), errors="coerce"))
