"""Captioned drawings without labels, for contrastive pretraining: Openclipart and emojis."""

from __future__ import annotations

import hashlib
from collections import Counter
from functools import cached_property, partial
from typing import Any

import datasets
import pyarrow.parquet as pq

from mm_moe.batch import IMAGE, TEXT, Sample
from mm_moe.data.chance import split_of
from mm_moe.data.reading import file_sha256, image_payload, reading, stream_parquet
from mm_moe.data.schema import NO_LABEL, DataSource
from mm_moe.data.sets.emoji import EmojiData, find_file
from mm_moe.errors import ConfigError

SHARES = {"train": 0.9, "validation": 0.1}
MAX_SHARED_TITLE = 20  # a title of more drawings than this names a collection, not a drawing


class OpenclipartEmojiData(DataSource):
    """Openclipart (7,447 drawings with noisy captions) and the embedded emojis' train split.

    A drawing's caption is its title. Where there is none, or where it is the title of more than 20
    drawings (the name of an icon set, such as the 1,375 called "gramastar"), it is the keywords.
    The validation split is a tenth of Openclipart's captions by their hash, so that no caption is
    in both; emojis of the validation and test splits of the emoji task are nowhere.

    Args:
        data_dir: folder that holds `openclipart.parquet` or `openclipart/openclipart.parquet`.
        with_keywords: let the keywords follow the title. They tell a text tower which words belong
            together, which titles alone hardly do.

    Raises:
        ConfigError: no `data_dir`.
        DataError: the folder holds no such file.
    """

    name = "openclipart_emoji"
    modalities = (IMAGE, TEXT)
    label_names = ()
    problem_type = NO_LABEL
    license = f"Openclipart 0.18: public domain; {EmojiData.license}"

    def __init__(self, data_dir: str | None = None, *, with_keywords: bool = False) -> None:
        super().__init__(data_dir)
        self.with_keywords = with_keywords
        if self.data_dir is None:
            raise ConfigError(
                "data set 'openclipart_emoji' needs data_dir: a folder that holds "
                "openclipart/openclipart.parquet."
            )
        self.path = find_file(self.data_dir, "openclipart.parquet")
        self.emoji = EmojiData()

    def splits(self) -> tuple[str, ...]:
        """Train and validation."""
        return tuple(SHARES)

    def stream(self, split: str) -> datasets.IterableDataset:
        """Rows of id, image and text: the drawings of a split; in train the emojis after them."""
        self.check_split(split)
        raw = stream_parquet(self.path, columns=("id", "image", "title", "keywords"))
        captioned = raw.map(
            partial(_captioned, shared=self._shared_titles, with_keywords=self.with_keywords),
            remove_columns=["title", "keywords"],
            features=datasets.Features(
                {
                    "id": datasets.Value("string"),
                    "image": datasets.Image(decode=False),
                    "text": datasets.Value("string"),
                    "caption": datasets.Value("string"),
                }
            ),
        )
        drawings = captioned.filter(partial(_is_in, split=split), input_columns=["caption"])
        drawings = drawings.remove_columns("caption")
        if split != "train":
            return drawings
        emojis = self.emoji.stream("train").select_columns(["id", "image", "text"])
        return datasets.concatenate_datasets([drawings, emojis])

    def to_sample(self, row: dict[str, Any]) -> Sample:
        """Image bytes and caption."""
        payload = {IMAGE: image_payload(row["image"]), TEXT: row["text"]}
        return Sample(row["id"], {k: v for k, v in payload.items() if v})

    def size(self, split: str) -> int:
        """Pairs in a split."""
        return self._sizes[self.check_split(split)]

    def fingerprint(self) -> str:
        """sha256 over the two files' own."""
        both = file_sha256(self.path) + self.emoji.fingerprint()
        return hashlib.sha256(both.encode()).hexdigest()

    @cached_property
    def _titles_and_keywords(self) -> list[tuple[str, list[str]]]:
        with reading(str(self.path)):
            table = pq.read_table(self.path, columns=["title", "keywords"])
        return list(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))

    @cached_property
    def _shared_titles(self) -> frozenset[str]:
        counts = Counter(title for title, _ in self._titles_and_keywords)
        return frozenset(title for title, count in counts.items() if count > MAX_SHARED_TITLE)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        found = [
            _split(caption(title, keywords, shared=self._shared_titles))
            for title, keywords in self._titles_and_keywords
        ]
        sizes = {split: found.count(split) for split in SHARES}
        return {**sizes, "train": sizes["train"] + self.emoji.size("train")}


def caption(title: str | None, keywords: list[str] | None, *, shared: frozenset[str]) -> str:
    """The words for a drawing: its own title, else its keywords, else a shared title.

    Args:
        title: as stored, possibly empty.
        keywords: as stored, possibly none.
        shared: titles that name collections.
    """
    title = " ".join((title or "").split())
    words = " ".join(word.replace("_", " ") for word in keywords or ())
    return words if words and (not title or title in shared) else title


def _split(text: str) -> str:
    return split_of(text, dataset=OpenclipartEmojiData.name, shares=SHARES)


def _is_in(text: str, *, split: str) -> bool:
    return _split(text) == split


def _captioned(
    row: dict[str, Any], *, shared: frozenset[str], with_keywords: bool
) -> dict[str, str]:
    """The caption, by which a drawing is split, and the text of its pair."""
    own = caption(row["title"], row["keywords"], shared=shared)
    words = caption(None, row["keywords"], shared=shared)
    text = f"{own}, {words}" if with_keywords and words and words != own else own
    return {"caption": own, "text": text}
