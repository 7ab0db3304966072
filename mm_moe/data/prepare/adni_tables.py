"""ADNI's study tables to one row per participant: labels, clinical data, biospecimens.

The steps are those of Flex-MoE's scripts. From each table the last known value of every column is
taken, in the order of UPDATE_STAMP; tables are joined on PTID, a column that several have keeps the
first known value; columns that all of them have (visit, phase, site, stamps) say nothing of the
participant and go.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from mm_moe.data.prepare.csv_tables import find_table, read_whole
from mm_moe.data.prepare.encoding import text_cells
from mm_moe.errors import DataError

PTID, STAMP, DIAGNOSIS = "PTID", "UPDATE_STAMP", "DIAGNOSIS"
FOLDERS = ("", "clinical", "biospecimen", "tables")
STUDY = {
    "clinical": ("MEDHIST", "NEUROEXM", "PTDEMOG", "RECCMEDS", "VITALS"),
    "biospecimen": ("APOERES", "UPENNBIOMK_ROCHE_ELECSYS"),
}
APOE, ELECSYS, DRUGS = "APOERES", "UPENNBIOMK_ROCHE_ELECSYS", "RECCMEDS"
# Years of the first symptoms and of the diagnosis, and the diagnosis under other names.
LEAKS = ("PTCOGBEG", "PTADDX", "PTADBEG", "DIAGNOSIS", "DXCURREN", "DXCHANGE")
IDENTIFIERS = ("RID", "ID", "SUBJECT_ID", "SUBJECT")
DEMENTIA_DRUGS = re.compile(
    "donepezil|aricept|memantine|namenda|namzaric|rivastigmine|exelon|galantamine|razadyne|"
    "reminyl|tacrine|cognex|aducanumab|aduhelm|lecanemab|leqembi|donanemab|kisunla",
    re.IGNORECASE,
)
MISSING_CODES = ("-4", "-4.0")  # ADNI's mark of a value that was not asked for


@dataclass
class Findings:
    """What the tables held that no model may see; names of columns and counts."""

    leaks: dict[str, list[str]] = field(default_factory=dict)
    drug_rows: int = 0
    unmapped_rows: int = 0
    tables: dict[str, list[str]] = field(default_factory=dict)


def labels_from_visits(path: Path) -> dict[str, str]:
    """PTID -> the diagnosis of all its visits, as its cell stands, from DXSUM.

    A participant with a visit without diagnosis, or with two diagnoses, is left out.

    Raises:
        DataError: see `read_whole`.
    """
    table = text_cells(read_whole(path, (PTID, DIAGNOSIS))[[PTID, DIAGNOSIS]])
    visits = table[table[PTID].notna()].groupby(PTID)[DIAGNOSIS]
    constant = visits.agg(lambda cells: cells.notna().all() and cells.nunique() == 1)
    return visits.first()[constant].to_dict()


def read_merged(path: Path) -> pd.DataFrame:
    """A table that is merged already, indexed by PTID; the index may have no heading.

    Raises:
        DataError: no PTID, or one that has several rows.
    """
    table = read_whole(path)
    if PTID not in table and len(table.columns) and table.columns[0].startswith("UNNAMED"):
        table = table.rename(columns={table.columns[0]: PTID})
    if PTID not in table:
        raise DataError(f"{path} has no column 'PTID'.")
    table = text_cells(table)
    table = table[table[PTID].notna()]
    repeated = np.flatnonzero(table[PTID].duplicated().to_numpy())
    if len(repeated):
        raise DataError(f"{path}: line {repeated[0] + 2} repeats the PTID of an earlier line.")
    return table.set_index(PTID)


def read_study(source: Path, part: str, findings: Findings, *, drugs: str) -> pd.DataFrame | None:
    """The joined study tables of one part (clinical or biospecimen), indexed by PTID.

    Args:
        source: the folder of the download.
        part: key of `STUDY`.
        findings: is told what was left out.
        drugs: "drop" lines of RECCMEDS that name a drug against dementia, or "keep" them.

    Returns:
        None where no table of the part is there.

    Raises:
        DataError: some tables of the part are there, others not; or a column is missing.
    """
    paths = {name: find_table(source, name, folders=FOLDERS) for name in STUDY[part]}
    if not any(paths.values()):
        return None
    lost = [name for name, path in paths.items() if path is None]
    if lost:
        raise DataError(
            f"{str(source)!r} has study tables of the {part} data, but no {lost[0]}.csv (or a "
            f"dated {lost[0]}_....csv); download it too, or leave the {part} data out by "
            '--options \'{"modalities": "..."}\'.'
        )
    tables = {name: text_cells(read_whole(Path(str(path)))) for name, path in paths.items()}
    tables = {name: table.mask(table.isin(MISSING_CODES)) for name, table in tables.items()}
    if part == "biospecimen":
        tables[ELECSYS], findings.unmapped_rows = with_ptid(tables[ELECSYS], tables[APOE])
    for name, table in tables.items():
        if PTID not in table:
            raise DataError(f"{paths[name]} has no column 'PTID'.")
    if DRUGS in tables and drugs == "drop":
        tables[DRUGS], findings.drug_rows = without_drugs(tables[DRUGS])
    findings.tables[part] = list(tables)
    return merge(tables)


def with_ptid(table: pd.DataFrame, apoe: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """A table that names participants by phase and RID, with the PTID that APOERES gives them.

    Returns:
        The table, and how many of its rows nobody could be found for; those are left out.

    Raises:
        DataError: a column is missing.
    """
    if PTID in table:
        return table, 0
    for name, frame in ((ELECSYS, table), (APOE, apoe)):
        for column in ("PHASE", "RID") + ((PTID,) if name == APOE else ()):
            if column not in frame:
                raise DataError(f"the table {name} has no column {column!r}.")
    known = dict(zip(_keys(apoe), apoe[PTID], strict=True))
    mapped = table.assign(**{PTID: [known.get(key, np.nan) for key in _keys(table)]})
    found = mapped[mapped[PTID].notna()]
    return found, len(mapped) - len(found)


def _keys(table: pd.DataFrame) -> list[tuple[str, str]]:
    """(last character of the phase, RID as a whole number) of each row."""
    phases = table["PHASE"].astype("string").fillna("").str[-1:]
    numbers = table["RID"].astype("string").fillna("").str.replace(r"\.0+$", "", regex=True)
    return list(zip(phases, numbers, strict=True))


def without_drugs(table: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """A table without the lines that name a drug against dementia, and how many those are."""
    names = pd.Series(False, index=table.index)
    for column in table.columns:
        names |= table[column].astype("string").str.contains(DEMENTIA_DRUGS, na=False)
    return table[~names], int(names.sum())


def merge(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row per PTID from several tables; see the module."""
    shared = set.intersection(*(set(table.columns) for table in tables.values()))
    if len(tables) == 1:
        shared = {STAMP}
    whole = pd.DataFrame()
    for table in tables.values():
        if STAMP in table:
            when = pd.to_datetime(table[STAMP], errors="coerce", format="mixed")
            table = table.loc[when.sort_values(kind="stable", na_position="first").index]
        table = table[table[PTID].notna()]
        # `last` is the last known value: the last row after filling forwards.
        own = table.drop(columns=[name for name in shared - {PTID} if name in table])
        whole = whole.combine_first(own.groupby(PTID).last())
    return whole


def drop_forbidden(table: pd.DataFrame, part: str, findings: Findings) -> pd.DataFrame:
    """The table without identifiers and without columns that tell the diagnosis."""
    leaks = [name for name in table.columns if name.startswith(LEAKS)]
    if leaks:
        findings.leaks[part] = leaks
    names = [name for name in table.columns if name in IDENTIFIERS]
    return table.drop(columns=leaks + names)
