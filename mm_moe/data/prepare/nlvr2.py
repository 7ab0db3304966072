"""NLVR2 (Suhr et al., 2019): is a sentence true of a pair of photos?

Layout: `{train,dev,test1}.json`, one JSON object a line ({"identifier": "train-10171-0-0",
"sentence", "label": "True" or "False", "directory": number, in train only}), in the folder itself
or in `data/`; images `train/<directory>/<pair>-img0.png`, `-img1.png`, and `dev/<pair>-img0.png`,
`test1/...`, in the folder itself or in `images/`. The pair is the identifier without its last
number: several sentences are about one pair.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mm_moe.batch import TEXT
from mm_moe.data.prepare.raw import IMAGES, TEXTS, RawDataSet, RawRow
from mm_moe.data.schema import SINGLE_LABEL
from mm_moe.errors import DataError

NAMES = {"train": "train", "validation": "dev", "test": "test1"}  # our splits, theirs
FIRST, SECOND = "image_0", "image_1"


class Nlvr2Raw(RawDataSet):
    """The published folder: modalities image_0 (left), image_1 (right) and text.

    Args:
        source: the folder.
    """

    name = "nlvr2"
    problem_type = SINGLE_LABEL
    task = SINGLE_LABEL
    label_names = ("False", "True")
    license = "NLVR2: sentences CC BY 4.0, photos under their own terms, not to be shared"
    notes = ("Sentences about one pair of photos are rows of one group.",)

    def __init__(self, source: Path) -> None:
        super().__init__(source)
        self.kinds = {FIRST: IMAGES, SECOND: IMAGES, TEXT: TEXTS}
        nested = ("data",) if (source / "data" / "train.json").is_file() else ()
        self.paths = {split: self.need(*nested, f"{name}.json") for split, name in NAMES.items()}
        images = ("images",) if (source / "images").is_dir() else ()
        self.folders = {split: self.need(*images, name) for split, name in NAMES.items()}

    def splits(self) -> tuple[str, ...]:
        """Train, validation ("dev") and test ("test1")."""
        return tuple(NAMES)

    def indices(self) -> list[Path]:
        """The three tables."""
        return list(self.paths.values())

    def rows(self, split: str) -> Iterator[RawRow]:
        """One row for each sentence about each pair."""
        for number, record in _lines(self.paths[split]):
            name, label = record.get("identifier"), str(record.get("label")).capitalize()
            if not isinstance(name, str) or name.count("-") < 2 or "/" in name:
                yield RawRow(f"{NAMES[split]}:{number}", fault="no identifier such as dev-1-0-0")
                continue
            pair, folder = name.rpartition("-")[0], self.folders[split]
            if split == "train":
                directory = str(record.get("directory"))
                if not directory.isdigit():
                    yield RawRow(name, fault="no number of a directory")
                    continue
                folder = folder / directory
            if label not in self.label_names:
                yield RawRow(name, fault="no label True or False")
                continue
            sentence = record.get("sentence")
            if not isinstance(sentence, str | None):
                yield RawRow(name, fault="the sentence is no text")
                continue
            payload: dict[str, Any] = {
                FIRST: folder / f"{pair}-img0.png",
                SECOND: folder / f"{pair}-img1.png",
                TEXT: sentence or "",
            }
            yield RawRow(name, payload, self.label_names.index(label), group=pair)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not empty."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{path} is not JSON lines: line {number} does not parse."
                ) from error
            yield number, record if isinstance(record, dict) else {}
