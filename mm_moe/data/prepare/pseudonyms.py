"""The pseudonyms of one preparation, and the file that translates them."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

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

    def hide(self, row: RawRow, split: str) -> dict[str, str | None]:
        """The row's names as pseudonyms; a group that is its id stays one with it."""
        names = {
            field: None if name is None else pseudonym(name, key=self.key)
            for field, name in (("id", row.id), ("group", row.group), ("mask_key", row.mask_key))
        }
        self._lines.append((str(names["id"]), row.id, row.group or "", split))
        return names

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
