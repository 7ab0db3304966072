"""A data set as an objective without task labels sees it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import datasets

from mm_moe.batch import Sample
from mm_moe.data.schema import NO_LABEL, DataSource


class Unlabelled(DataSource):
    """The samples of a data set without their labels: the model gets no head, and none is scored.

    Name, splits, ids and hash stay, so the missing mask is that of the labelled data set.

    Args:
        source: the data set.
    """

    def __init__(self, source: DataSource) -> None:
        super().__init__(None)
        self.data_dir, self.source, self.remote = source.data_dir, source, source.remote
        self.name, self.modalities, self.license = source.name, source.modalities, source.license
        self.label_names, self.problem_type, self.task = (), NO_LABEL, None
        self.sequences, self.array_shapes = source.sequences, source.array_shapes
        self.private, self.left_out = source.private, source.left_out

    def splits(self) -> tuple[str, ...]:
        """Those of the data set."""
        return self.source.splits()

    def stream(self, split: str) -> datasets.IterableDataset:
        """Those of the data set."""
        return self.source.stream(split)

    def to_sample(self, row: dict[str, Any]) -> Sample:
        """The data set's sample, without its label."""
        return replace(self.source.to_sample(row), label=None)

    def index(self, split: str) -> Iterator[Sample]:
        """The data set's ids."""
        for sample in self.source.index(split):
            yield replace(sample, label=None)

    def line(
        self, split: str, *, seed: int, shuffle_buffer: int, start: int
    ) -> Iterator[tuple[int, dict[str, Any]]] | None:
        """The data set's order."""
        return self.source.line(split, seed=seed, shuffle_buffer=shuffle_buffer, start=start)

    def size(self, split: str) -> int | None:
        """Rows of a split."""
        return self.source.size(split)

    def fingerprint(self) -> str:
        """That of the data set."""
        return self.source.fingerprint()
