"""Photos of groceries with a description of their class: 43 coarse classes.

The descriptions belong to the 81 fine classes, not to single photos: 77 of them name their class,
and even without its name a text tells its class once it was seen in training. Class words are
masked here; the rest of that leak is in the data: a score from text measures recognition of known
texts.
"""

from __future__ import annotations

import hashlib
import re
from functools import cached_property
from typing import Any

import datasets
import pyarrow.parquet as pq

from mm_moe.batch import IMAGE, TEXT, Sample
from mm_moe.data.reading import file_sha256, image_payload, reading, stream_parquet
from mm_moe.data.schema import SINGLE_LABEL, DataSource
from mm_moe.data.sets.emoji import find_file
from mm_moe.errors import ConfigError, DataError

NAMES = {"train": "train", "validation": "val", "test": "test"}  # our splits, theirs
MASK = "item"
SHORTEST_WORD = 3  # shorter parts of class names ("R", "P") are no class words


class GroceryData(DataSource):
    """Grocery Store Dataset (Klasson et al., 2019): 5,421 photos at 128 pixels, published splits.

    Args:
        data_dir: folder that holds `photos.parquet` and `classes.parquet`, or `grocery/` with them.

    Raises:
        ConfigError: no `data_dir`.
        DataError: the files are not there.
    """

    name = "grocery"
    modalities = (IMAGE, TEXT)
    problem_type = SINGLE_LABEL
    license = "Grocery Store Dataset: MIT (M. Klasson et al.)"

    def __init__(self, data_dir: str | None = None) -> None:
        super().__init__(data_dir)
        if self.data_dir is None:
            raise ConfigError(
                "data set 'grocery' needs data_dir: a folder that holds grocery/photos.parquet."
            )
        nested = self.data_dir / "grocery"
        folder = nested if nested.is_dir() else self.data_dir
        self.path = find_file(folder, "photos.parquet")
        self.classes_path = find_file(folder, "classes.parquet")

    def splits(self) -> tuple[str, ...]:
        """Train, validation and test, as published."""
        return tuple(NAMES)

    def stream(self, split: str) -> datasets.IterableDataset:
        """Photos of a split with their class numbers."""
        filters = [("split", "==", NAMES[self.check_split(split)])]
        columns = ("id", "split", "image", "fine", "coarse")
        return stream_parquet(self.path, columns=columns, filters=filters)

    def to_sample(self, row: dict[str, Any]) -> Sample:
        """The photo, its class' masked description, and the index of the coarse class."""
        if row["fine"] not in self._descriptions:
            raise DataError(
                f"sample {row['id']!r} has the fine class {row['fine']}, which "
                f"{self.classes_path.name} does not list."
            )
        text, label = self._descriptions[row["fine"]]
        payload = {IMAGE: image_payload(row["image"]), TEXT: text}
        return Sample(row["id"], {k: v for k, v in payload.items() if v}, label)

    def size(self, split: str) -> int:
        """Photos in a split."""
        return self._sizes[self.check_split(split)]

    def fingerprint(self) -> str:
        """sha256 over the two files' own."""
        both = file_sha256(self.path) + file_sha256(self.classes_path)
        return hashlib.sha256(both.encode()).hexdigest()

    @cached_property
    def label_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """The coarse classes, sorted by name."""
        return tuple(sorted({row["coarse_name"] for row in self._classes}))

    @cached_property
    def _classes(self) -> list[dict[str, Any]]:
        columns = ["fine", "name", "coarse_name", "description"]
        with reading(str(self.classes_path)):
            return pq.read_table(self.classes_path, columns=columns).to_pylist()

    @cached_property
    def _descriptions(self) -> dict[int, tuple[str, int]]:
        """Fine class -> masked description and coarse index."""
        words = class_words(
            name for row in self._classes for name in (row["name"], row["coarse_name"])
        )
        return {
            row["fine"]: (
                mask(row["description"] or "", words),
                self.label_names.index(row["coarse_name"]),
            )
            for row in self._classes
        }

    @cached_property
    def _sizes(self) -> dict[str, int]:
        with reading(str(self.path)):
            found = pq.read_table(self.path, columns=["split"])["split"].to_pylist()
        return {split: found.count(theirs) for split, theirs in NAMES.items()}


def class_words(names: Any) -> frozenset[str]:
    """The words that class names are made of, in small letters and without a plural s."""
    parts = (part for name in names for part in re.split(r"[^a-z]+", name.lower()))
    return frozenset(part.removesuffix("s") for part in parts if len(part) >= SHORTEST_WORD)


def mask(text: str, words: frozenset[str]) -> str:
    """The text with every class word (also with a final s, es or 's) replaced by "item"."""

    def replace(match: re.Match[str]) -> str:
        word = match[0].lower().removesuffix("'s")
        stems = (word, word.removesuffix("s"), word.removesuffix("es"))
        return MASK if any(stem in words for stem in stems) else match[0]

    return re.sub(r"[^\W\d_]+(?:'s)?", replace, text)
