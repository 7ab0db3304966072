"""The pseudonyms of one preparation, and the file that translates them."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm_moe.data.prepare.raw import RawDataSet, RawRow
from mm_moe.data.privacy import content_key, pseudonym
from mm_moe.errors import DataError

IDS = "ids.csv"
COLUMNS = ("pseudonym", "id", "group", "split")


class Pseudonyms:
    """Hides the names of rows and remembers them for `ids.csv`.

    Args:
        key: of the hash.
    """

    def __init__(self, key: bytes) -> None:
        self.key = key
        self._lines: list[tuple[str, str, str, str]] = []

    @classmethod
    def of(cls, raw: RawDataSet) -> Pseudonyms:
        """With the key from the download's own files.

        Raises:
            DataError: one of them cannot be read.
        """
        try:
            return cls(content_key(raw.key_files()))
        except OSError as error:
            raise DataError(
                f"{error.filename} cannot be read: {error.strerror}; the pseudonyms need it."
            ) from error

    def hide(self, row: RawRow, split: str) -> RawRow:
        """The row under pseudonyms; a group that is its id stays one with it."""
        hidden = replace(
            row, id=self._of(row.id), group=self._of(row.group), mask_key=self._of(row.mask_key)
        )
        self._lines.append((hidden.id, row.id, row.group or "", split))
        return hidden

    def _of(self, name: Any) -> Any:
        """The pseudonym of a name; None of None."""
        return None if name is None else pseudonym(name, key=self.key)

    def write(self, folder: Path) -> None:
        """`ids.csv`, for its owner only."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows(self._lines)
        write_owned(folder / IDS, text.getvalue().encode())


def write_owned(path: Path, content: bytes) -> None:
    """A file that only its owner may read, from its first byte on."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
