"""Is a sentence true of three boxes of coloured shapes? NLVR (Suhr et al., 2017).

A picture shows three boxes side by side; here each box is an image of its own, so that a model has
four modalities. Two of the six orders of the boxes are there for every sentence; truth does not
depend on the order, and the two rows are one group with one fate under missing masks.

The published test and hidden sets train here, a tenth of them (by the first number of the
identifier, whose sentences come from one presentation) validates, and the dev set tests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq

from mm_moe.batch import TEXT, Sample
from mm_moe.data.chance import split_of
from mm_moe.data.decode import Region
from mm_moe.data.reading import file_sha256, image_payload, reading
from mm_moe.data.schema import SINGLE_LABEL, DataSource, label_index
from mm_moe.data.sets.emoji import find_file
from mm_moe.errors import ConfigError

TABLES = ("test", "hidden", "dev")
SHARES = {"train": 0.9, "validation": 0.1}  # of the tables test and hidden
SIDE, STEP = 100, 150  # pixels of a box, and from one box to the next
BOXES = {f"image_{n}": (n * STEP, 0, n * STEP + SIDE, SIDE) for n in range(3)}


class NlvrData(DataSource):
    """Three boxes and a sentence to false or true.

    Args:
        data_dir: folder that holds `{dev,test,hidden}.parquet` and `*_images.parquet`, or `nlvr/`
            with them.

    Raises:
        ConfigError: no `data_dir`.
        DataError: a file is not there.
    """

    name = "nlvr"
    modalities = (*BOXES, TEXT)
    label_names = ("false", "true")
    problem_type = SINGLE_LABEL
    license = "NLVR (Suhr et al., 2017): CC BY 4.0"

    def __init__(self, data_dir: str | None = None) -> None:
        super().__init__(data_dir)
        if self.data_dir is None:
            raise ConfigError(
                "data set 'nlvr' needs data_dir: a folder that holds nlvr/dev.parquet."
            )
        nested = self.data_dir / "nlvr"
        folder = nested if nested.is_dir() else self.data_dir
        self.sentences = {name: find_file(folder, f"{name}.parquet") for name in TABLES}
        self.images = {name: find_file(folder, f"{name}_images.parquet") for name in TABLES}

    def splits(self) -> tuple[str, ...]:
        """Train, validation and test."""
        return (*SHARES, "test")

    def stream(self, split: str) -> datasets.IterableDataset:
        """Rows of a split, each with the encoded picture of all three boxes."""
        rows = self._rows[self.check_split(split)]
        tables = sorted({row["table"] for row in rows})
        paths = {name: self.images[name] for name in tables}
        return datasets.IterableDataset.from_generator(partial(_with_images, rows, paths))

    def to_sample(self, row: dict[str, Any]) -> Sample:
        """Three regions of the picture, the sentence, and whether it is true."""
        picture = image_payload(row["image"])
        payload: dict[str, Any] = {TEXT: row["sentence"]} if row["sentence"] else {}
        if picture:
            payload |= {name: Region(picture, box) for name, box in BOXES.items()}
        label = label_index(row["label"], self.label_names, sample_id=row["id"])
        return Sample(row["id"], payload, label, group=row["group"])

    def index(self, split: str) -> Iterator[Sample]:
        """Ids, labels and groups; no picture is read."""
        for row in self._rows[self.check_split(split)]:
            yield self.to_sample({**row, "image": None})

    def size(self, split: str) -> int:
        """Two for each sentence of the split."""
        return len(self._rows[self.check_split(split)])

    def fingerprint(self) -> str:
        """sha256 over the files' own."""
        paths = [*self.sentences.values(), *self.images.values()]
        return hashlib.sha256("".join(map(file_sha256, paths)).encode()).hexdigest()

    @cached_property
    def _rows(self) -> dict[str, list[dict[str, Any]]]:
        """Split -> its rows in the order of the files, without pictures."""
        found: dict[str, list[dict[str, Any]]] = {split: [] for split in self.splits()}
        for table in TABLES:
            with reading(str(self.sentences[table])):
                sentences = pq.read_table(self.sentences[table]).to_pylist()
                columns = ["identifier", "permutation"]
                orders = pq.read_table(self.images[table], columns=columns).to_pylist()
            about = {row["identifier"]: row for row in sentences}
            for order in orders:
                name = order["identifier"]
                row = {
                    "id": f"{table}-{name}-{order['permutation']}",
                    "group": f"{table}-{name}",
                    "table": table,
                    "sentence": about[name]["sentence"],
                    "label": about[name]["label"],
                }
                found[_split_of(table, name)].append(row)
        return found


def _split_of(table: str, identifier: str) -> str:
    if table == "dev":
        return "test"
    key = f"{table}-{identifier.partition('-')[0]}"
    return split_of(key, dataset=NlvrData.name, shares=SHARES)


def _with_images(rows: list[dict[str, Any]], paths: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """The rows with the encoded picture of their boxes."""
    pictures: dict[str, bytes] = {}
    for table, path in paths.items():
        with reading(str(path)):
            for row in pq.read_table(path).to_pylist():
                name = f"{table}-{row['identifier']}-{row['permutation']}"
                pictures[name] = row["image"]["bytes"]
    for row in rows:
        yield {**row, "image": pictures.get(row["id"])}
