"""Raw sets that are one JSON object id -> record per split, with an image file for each id.

Layout: `{set}_dataset_{train,val,test}.json` in `{set}_data/data_raw/`, in `data_raw/` or in the
folder itself, and `{id}.jpg` (or another ending) beside the tables or in a folder of images there.
It is how the released code of interaction experts keeps MMSD2.0, MUStARD and UR-FUNNY.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mm_moe.batch import CONTEXT, IMAGE, TEXT
from mm_moe.data.prepare.raw import IMAGES, SPLITS, TEXTS, RawDataSet, RawRow, read_json
from mm_moe.data.schema import SINGLE_LABEL
from mm_moe.errors import ConfigError, DataError

NAMES = {"train": "train", "validation": "val", "test": "test"}  # our splits, theirs
IMAGE_FOLDERS = ("", "images", "image", "image_data", "dataset_image", "frames")


class IdRecords(RawDataSet):
    """One of these sets.

    Args:
        source: the folder.
        images: folder of the image files, below that of the tables or absolute; by default they
            are looked for beside the tables and in folders of the usual names. False: no images.
        context: add the sentences before as the modality "context" (sets that have them).

    Raises:
        ConfigError: no modality is left, or a context that the set does not have.
        DataError: the folder is not in this layout.
    """

    problem_type = SINGLE_LABEL
    task = SINGLE_LABEL
    ending = ".jpg"
    has_context = False

    def __init__(
        self, source: Path, *, images: str | bool = True, context: bool | None = None
    ) -> None:
        super().__init__(source)
        self.tables = self.find_tables()
        self.records = {split: self.read(split) for split in SPLITS}
        self.image_folder = self.find_images(images) if images else None
        self.context = (self.has_context and not images) if context is None else context
        if self.context and not self.has_context:
            raise ConfigError(f"--options context: {self.name!r} has no sentences before the text.")
        self.kinds = {IMAGE: IMAGES} if self.image_folder else {}
        self.kinds |= {TEXT: TEXTS} | ({CONTEXT: TEXTS} if self.context else {})

    def find_tables(self) -> dict[str, Path]:
        """Split -> its table."""
        places = (f"{self.name}_data/data_raw", "data_raw", "")
        names = {split: f"{self.name}_dataset_{NAMES[split]}.json" for split in SPLITS}
        place = next((p for p in places if (self.source / p / names["train"]).is_file()), "")
        return {split: self.need(*Path(place).parts, name) for split, name in names.items()}

    def read(self, split: str) -> dict[str, Any]:
        """The records of a split by id."""
        return read_json(self.tables[split], kind=dict)

    def find_images(self, images: str | bool) -> Path:
        """The folder in which the first ids have their images."""
        base = self.tables["train"].parent
        names = [f"{key}{self.ending}" for table in self.records.values() for key in [*table][:5]]
        folders = [images] if isinstance(images, str) else list(IMAGE_FOLDERS)
        for folder in folders:
            if any((base / folder / name).is_file() for name in names):
                return base / folder
        raise DataError(
            f"no image such as {names[0] if names else self.ending!r} is in {str(base)!r} (looked "
            f"in {', '.join(folder or 'itself' for folder in folders)}); name their folder with "
            '--options \'{"images": "FOLDER"}\', or do without them: \'{"images": false}\'.'
        )

    def splits(self) -> tuple[str, ...]:
        """Train, validation ("val") and test."""
        return SPLITS

    def indices(self) -> list[Path]:
        """The tables."""
        return sorted(set(self.tables.values()))

    @property
    def options(self) -> dict[str, Any]:
        """What the rows were made of."""
        return {"images": self.image_folder is not None, "context": self.context}

    def rows(self, split: str) -> Iterator[RawRow]:
        """One row for each record."""
        for sample_id, record in self.records[split].items():
            yield self.row(sample_id, record)

    def row(self, sample_id: str, record: Any) -> RawRow:
        """A record as a row, or as a fault that says which key is wrong."""
        if not isinstance(record, dict):
            return RawRow(sample_id, fault="the record is no object")
        if Path(sample_id).name != sample_id:
            return RawRow(sample_id, fault="the id is no file name")
        try:
            text, before, label = self.parts(record)
        except KeyError as error:
            return RawRow(sample_id, fault=f"no {error.args[0]} in the record")
        except TypeError as error:
            return RawRow(sample_id, fault=str(error))
        payload: dict[str, Any] = {TEXT: text, CONTEXT: "\n".join(before)}
        if self.image_folder is not None:
            payload[IMAGE] = self.image_folder / f"{sample_id}{self.ending}"
        return RawRow(sample_id, {name: payload[name] for name in self.kinds}, label)

    @abstractmethod
    def parts(self, record: dict[str, Any]) -> tuple[str, list[str], int]:
        """(text, sentences before it, label).

        Raises:
            KeyError: a key is missing.
            TypeError: a value is of the wrong kind; the text says which.
        """


def text_of(record: dict[str, Any], key: str) -> str:
    """A text under a key.

    Raises:
        KeyError, TypeError: see `IdRecords.parts`.
    """
    value = record[key]
    if not isinstance(value, str):
        raise TypeError(f"{key} is no text")
    return value


def texts_of(record: dict[str, Any], key: str) -> list[str]:
    """A list of texts under a key.

    Raises:
        KeyError, TypeError: see `IdRecords.parts`.
    """
    value = record[key]
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise TypeError(f"{key} is no list of texts")
    return value


def truth_of(record: dict[str, Any], key: str) -> int:
    """A yes or no under a key, written as a truth value or as 0 or 1.

    Raises:
        KeyError, TypeError: see `IdRecords.parts`.
    """
    value = record[key]
    if value not in (0, 1):
        raise TypeError(f"wrong label: {key} is neither 0 nor 1")
    return int(value)
