"""Questions about radiology images: VQA-RAD (Lau et al., 2018), 2,248 on 315 images.

The published test split are the rows whose `phrase_type` begins with "test"; no question has its
paraphrase on the other side. Nearly every test image is also seen in training, with other
questions: a score is about new questions, not about new patients. Validation rows are a tenth of
the training rows' images by a keyed hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq

from mm_moe.batch import IMAGE, TEXT, Sample
from mm_moe.data.answers import plain_answer, vocabulary
from mm_moe.data.chance import split_of
from mm_moe.data.prepare.raw import read_json
from mm_moe.data.reading import file_sha256, image_payload, reading
from mm_moe.data.schema import MULTI_LABEL, SINGLE_LABEL, VQA, DataSource
from mm_moe.data.sets.emoji import find_file
from mm_moe.errors import ConfigError, DataError

SPLITS = ("train", "validation", "test")
YES_NO = ("no", "yes")
KINDS = ("closed", "open", "all")
SHARES = {"train": 0.9, "validation": 0.1}  # of the published training images


class VqaRadData(DataSource):
    """Radiology image and question to an answer.

    Args:
        data_dir: folder that holds `vqa_rad.json` and `images.parquet`, or `vqa_rad/` with them.
        questions: "closed": those answered yes or no, two classes, accuracy. "open": all others,
            over a vocabulary of the training answers, scored as VQA (an answer outside it can
            only be wrong). "all": both, likewise.
        min_count: training questions with an answer that is a class; for "open" and "all".

    Raises:
        ConfigError: no `data_dir`, or an unknown option.
        DataError: the files are not there, or not in the layout.
    """

    name = "vqa_rad"
    modalities = (IMAGE, TEXT)
    license = "VQA-RAD (Lau et al., 2018): CC0 1.0"

    def __init__(
        self, data_dir: str | None = None, *, questions: str = "closed", min_count: int = 2
    ) -> None:
        super().__init__(data_dir)
        if self.data_dir is None:
            raise ConfigError(
                "data set 'vqa_rad' needs data_dir: a folder that holds vqa_rad/vqa_rad.json."
            )
        if questions not in KINDS:
            raise ConfigError(
                f"vqa_rad: questions is {questions!r}; take one of {', '.join(KINDS)}."
            )
        if not isinstance(min_count, int) or min_count < 1:
            raise ConfigError(f"vqa_rad: min_count ({min_count!r}) must be at least 1.")
        nested = self.data_dir / "vqa_rad"
        folder = nested if nested.is_dir() else self.data_dir
        self.path = find_file(folder, "vqa_rad.json")
        self.images_path = find_file(folder, "images.parquet")
        self.questions, self.min_count = questions, min_count
        closed = questions == "closed"
        self.problem_type = SINGLE_LABEL if closed else MULTI_LABEL
        self.task = None if closed else VQA

    def splits(self) -> tuple[str, ...]:
        """Train, validation and test."""
        return SPLITS

    def stream(self, split: str) -> datasets.IterableDataset:
        """The questions of a split, each with its encoded image."""
        rows = self._rows[self.check_split(split)]
        return datasets.IterableDataset.from_generator(
            partial(_with_images, rows, self.images_path)
        )

    def to_sample(self, row: dict[str, Any]) -> Sample:
        """Image, question, and the answer's class or shares; questions on one image are a group."""
        label: Any = self._index_of.get(plain_answer(row["answer"]))
        if self.problem_type == MULTI_LABEL:  # one annotator, whose answer has the whole share
            label = {} if label is None else {label: 1.0}
        payload = {IMAGE: image_payload(row["image"]), TEXT: row["question"]}
        kept = {name: value for name, value in payload.items() if value}
        return Sample(row["id"], kept, label, group=row["image_name"], mask_key=row["id"])

    def index(self, split: str) -> Iterator[Sample]:
        """Ids, labels and groups; no image is read."""
        for row in self._rows[self.check_split(split)]:
            yield self.to_sample({**row, "image": None})

    def size(self, split: str) -> int:
        """Questions in a split."""
        return len(self._rows[self.check_split(split)])

    def fingerprint(self) -> str:
        """sha256 over the two files' own."""
        both = file_sha256(self.path) + file_sha256(self.images_path)
        return hashlib.sha256(both.encode()).hexdigest()

    @cached_property
    def label_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """No and yes, or the vocabulary of the training answers (validation rows apart)."""
        if self.questions == "closed":
            return YES_NO
        return vocabulary((row["answer"] for row in self._rows["train"]), min_count=self.min_count)

    @cached_property
    def _index_of(self) -> dict[str, int]:
        return {answer: index for index, answer in enumerate(self.label_names)}

    @cached_property
    def _rows(self) -> dict[str, list[dict[str, Any]]]:
        """Split -> its questions in the file's order, without images."""
        found: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        for entry in read_json(self.path, kind=list):
            try:
                row = {
                    "id": f"q{entry['qid']}",
                    "image_name": str(entry["image_name"]),
                    "question": str(entry["question"]),
                    "answer": str(entry["answer"]),
                }
                phrase = str(entry["phrase_type"])
            except KeyError as error:
                raise DataError(f"{self.path}: an entry lacks {error}.") from error
            except TypeError as error:
                raise DataError(f"{self.path}: an entry is no object.") from error
            is_closed = plain_answer(row["answer"]) in YES_NO
            if self.questions == "all" or is_closed == (self.questions == "closed"):
                found[_split_of(phrase, row["image_name"])].append(row)
        return found


def _split_of(phrase_type: str, image_name: str) -> str:
    if phrase_type.startswith("test"):
        return "test"
    return split_of(image_name, dataset=VqaRadData.name, shares=SHARES)


def _with_images(rows: list[dict[str, Any]], path: Path) -> Iterator[dict[str, Any]]:
    """The rows with their encoded images."""
    with reading(str(path)):
        table = pq.read_table(path, columns=["image_name", "image"]).to_pylist()
    images = {row["image_name"]: row["image"] for row in table}  # `to_sample` takes it apart
    for row in rows:
        yield {**row, "image": images.get(row["image_name"])}
