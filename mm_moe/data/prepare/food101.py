"""UPMC Food-101 (Wang et al., 2015): food photos from the web with their pages' titles.

Layout: `images/{train,test}/<class>/<class>_<i>.jpg`, `class_idx.json` (class name -> 0..100),
`text.json` (file name -> title) and `split.json` ({"train", "val", "test"} -> file names; 61,142 /
6,846 / 22,716). The validation images lie in `images/train`. `texts/*_titles.csv` is not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mm_moe.batch import IMAGE, TEXT
from mm_moe.data.prepare.raw import IMAGES, TEXTS, RawDataSet, RawRow, first_text, read_json
from mm_moe.data.schema import SINGLE_LABEL
from mm_moe.errors import DataError

NAMES = {"train": "train", "validation": "val", "test": "test"}  # our splits, theirs
FOLDERS = {"train": "train", "validation": "train", "test": "test"}


class Food101Raw(RawDataSet):
    """The published folder; a file's class is its name up to the last underscore.

    Args:
        source: the folder.
    """

    name = "food101"
    problem_type = SINGLE_LABEL
    task = SINGLE_LABEL
    license = "UPMC Food-101 (Wang et al., 2015): for research; pictures belong to their owners"
    notes = (
        "Rows without a title are kept and lack their text; earlier loaders skip them, so their "
        "test sets are smaller.",
        "The validation images lie in images/train.",
    )

    def __init__(self, source: Path) -> None:
        super().__init__(source)
        self.kinds = {IMAGE: IMAGES, TEXT: TEXTS}
        self.files = [self.need(f"{name}.json") for name in ("class_idx", "text", "split")]
        classes, texts, names = (read_json(path, kind=dict) for path in self.files)
        if sorted(classes.values(), key=str) != sorted(range(len(classes)), key=str):
            raise DataError(f"{self.files[0]} does not number its {len(classes)} classes from 0.")
        self.label_names = tuple(sorted(classes, key=classes.__getitem__))
        self.classes: dict[str, int] = classes
        self.texts: dict[str, Any] = texts
        self.names: dict[str, Any] = names
        for name in NAMES.values():
            if not isinstance(names.get(name), list):
                raise DataError(f"{self.files[2]} has no list {name!r} of file names.")
        for folder in ("train", "test"):
            self.need("images", folder)

    def splits(self) -> tuple[str, ...]:
        """Train, validation ("val") and test, as published."""
        return tuple(NAMES)

    def indices(self) -> list[Path]:
        """Classes, titles and splits."""
        return self.files

    def rows(self, split: str) -> Iterator[RawRow]:
        """One row for each file."""
        for file in map(str, self.names[NAMES[split]]):
            name = file.rpartition("_")[0]
            if name not in self.classes or Path(file).name != file:
                yield RawRow(file, fault="no label: the file name has none of the classes")
                continue
            payload: dict[str, Any] = {IMAGE: self.source / "images" / FOLDERS[split] / name / file}
            text = first_text(self.texts.get(file))
            if text:
                payload[TEXT] = text
            yield RawRow(file, payload, self.classes[name])
