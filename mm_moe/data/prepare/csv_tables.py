"""Tables of a clinical download: CSV files, plain or gzipped, whole or in chunks.

Errors name files, columns and lines, never a cell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mm_moe.errors import DataError

CHUNK_ROWS = 200_000  # of a file that may not fit into memory
MISSING = ("", "NA", "NaN", "nan", "NULL")


def find_table(source: Path, name: str, *, folders: Sequence[str] = ("",)) -> Path | None:
    """The file `NAME.csv`, `NAME_....csv` (a dated export) or `NAME.csv.gz`, in any letter case.

    Raises:
        DataError: several files fit.
    """
    found = []
    for folder in folders:
        place = source / folder
        for path in sorted(place.iterdir()) if place.is_dir() else []:
            stem, _, ending = path.name.lower().partition(".csv")
            if ending in ("", ".gz") and ".csv" in path.name.lower():
                exact = stem == name.lower()
                if exact or stem.startswith(f"{name.lower()}_"):
                    found.append((not exact, path))
    exact_ones = [path for dated, path in found if not dated]
    paths = exact_ones or [path for _, path in found]
    if len(paths) > 1:
        raise DataError(
            f"{', '.join(str(path) for path in paths)} all fit the table {name}; keep one of them."
        )
    return paths[0] if paths else None


def read_chunks(
    path: Path,
    needed: Sequence[str],
    *,
    optional: Sequence[str] = (),
    chunk_rows: int = CHUNK_ROWS,
    as_text: bool = False,
) -> Iterator[pd.DataFrame]:
    """Frames of at most `chunk_rows` lines with these columns under lower-case names.

    Args:
        path: CSV or CSV.gz.
        needed: columns that must be there, lower case.
        optional: columns that are read where they are.
        chunk_rows: lines in memory at once.
        as_text: cells as they stand; else numbers are numbers.

    Raises:
        DataError: the file cannot be read, or lacks a column.
    """
    try:
        head = pd.read_csv(path, nrows=0)
        spelt = {str(column).strip().lower(): str(column) for column in head.columns}
        lost = [name for name in needed if name not in spelt]
        if lost:
            raise DataError(
                f"{path} has no column {lost[0]!r}; its columns are {', '.join(spelt) or 'none'}."
            )
        names = [*needed, *(name for name in optional if name in spelt)]
        options: dict[str, Any] = {"dtype": str} if as_text else {"low_memory": False}
        with pd.read_csv(
            path,
            usecols=[spelt[name] for name in names],
            chunksize=chunk_rows,
            keep_default_na=False,
            na_values=list(MISSING),
            **options,
        ) as reader:
            for frame in reader:
                renamed = frame.rename(columns={spelt[name]: name for name in names})
                yield renamed[names]
    except (OSError, EOFError, UnicodeDecodeError, ValueError) as error:  # pandas' are ValueErrors
        raise DataError(
            f"{path} cannot be read as a table: {type(error).__name__}; is the download whole?"
        ) from error


def read_table(path: Path, needed: Sequence[str] = (), **options: Any) -> pd.DataFrame:
    """A small table at once; see `read_chunks`."""
    frames = list(read_chunks(path, needed, **options))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(needed))


def read_whole(path: Path, needed: Sequence[str] = ()) -> pd.DataFrame:
    """A small table with all its columns, in upper case, cells as text or NaN.

    Raises:
        DataError: the file cannot be read, or lacks a column.
    """
    try:
        frame = pd.read_csv(
            path,
            dtype=str,
            keep_default_na=False,
            na_values=list(MISSING),
            encoding_errors="strict",
        )
    except (OSError, EOFError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as a table: {type(error).__name__}; is the download whole?"
        ) from error
    frame.columns = [str(column).strip().upper() for column in frame.columns]
    lost = [name for name in needed if name not in frame.columns]
    if lost:
        raise DataError(
            f"{path} has no column {lost[0]!r}; its columns are "
            f"{', '.join(frame.columns[:20]) or 'none'}."
        )
    return frame
