"""Emojis in two drawing styles: image and Unicode name to one of nine categories.

A part of the set ships with the package (`mm_moe/data/embedded`, with its licences), so that this
is the data set that always works. An emoji's two drawings share its name, so the text of a row is
met twice; rows are split by emoji for that reason.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq

from mm_moe.batch import IMAGE, TEXT, Sample
from mm_moe.data.embedded.make_emoji import COLUMNS, NAME, SHARES, emoji_split
from mm_moe.data.embedded.make_emoji import OUTPUT as EMBEDDED
from mm_moe.data.reading import file_sha256, image_payload, reading, stream_parquet
from mm_moe.data.schema import SINGLE_LABEL, DataSource, label_index
from mm_moe.errors import DataError


class EmojiData(DataSource):
    """The embedded 1,266 emojis, or the full 1,906 from a folder.

    The full set is split by the same hash of an emoji's code points, so that the embedded train
    split lies within the full one; an emoji's drawings are always in one split.

    Args:
        data_dir: folder that holds the full set's `emoji.parquet` (or `emoji/emoji.parquet`);
            without it the embedded part is read.

    Raises:
        DataError: the folder holds no such file.
    """

    name = NAME
    modalities = (IMAGE, TEXT)
    label_names = (
        "Activities",
        "Animals & Nature",
        "Flags",
        "Food & Drink",
        "Objects",
        "People & Body",
        "Smileys & Emotion",
        "Symbols",
        "Travel & Places",
    )
    problem_type = SINGLE_LABEL
    license = (
        "emoji-datasource 16.0.0: metadata MIT (C. Henderson); Noto Emoji images Apache-2.0 "
        "(Google); Twemoji images CC-BY 4.0 (Twitter, Inc and other contributors)"
    )

    def __init__(self, data_dir: str | None = None) -> None:
        super().__init__(data_dir)
        self.path = EMBEDDED if self.data_dir is None else find_file(self.data_dir, "emoji.parquet")

    def splits(self) -> tuple[str, ...]:
        """Train, validation and test."""
        return tuple(SHARES)

    def stream(self, split: str) -> datasets.IterableDataset:
        """Rows of a split; the embedded file by its `split` column, the full one by the hash."""
        self.check_split(split)
        if self.data_dir is None:
            filters = [("split", "==", split)]
            return stream_parquet(self.path, columns=(*COLUMNS, "split"), filters=filters)
        full = stream_parquet(self.path, columns=COLUMNS)
        return full.filter(lambda unified: emoji_split(unified) == split, input_columns=["unified"])

    def to_sample(self, row: dict[str, Any]) -> Sample:
        """Image bytes, name, and the index of the category; the drawings of an emoji are a group.

        Each drawing has its own missing mask, so that one of them may lack what the other has.
        """
        label = label_index(row["category"], self.label_names, sample_id=row["id"])
        payload = {IMAGE: image_payload(row["image"]), TEXT: row["text"]}
        payload = {name: value for name, value in payload.items() if value}
        return Sample(row["id"], payload, label, group=row["unified"], mask_key=row["id"])

    def size(self, split: str) -> int:
        """Drawings in a split."""
        return self._sizes[self.check_split(split)]

    @cached_property
    def _sizes(self) -> dict[str, int]:
        with reading(str(self.path)):
            codes = pq.read_table(self.path, columns=["unified"])["unified"].to_pylist()
        found = [emoji_split(code) for code in codes]
        return {split: found.count(split) for split in SHARES}

    def fingerprint(self) -> str:
        """sha256 of the file."""
        return file_sha256(self.path)


def find_file(folder: Path, name: str) -> Path:
    """`folder/name`, or `folder/<stem>/name` for a folder that holds several data sets.

    Raises:
        DataError: neither exists.
    """
    places = [folder / name, folder / Path(name).stem / name]
    for place in places:
        if place.is_file():
            return place
    raise DataError(f"there is no {places[0]} and no {places[1]}; data_dir must hold {name}.")
