"""The training rows that lack nothing: what is left of incomplete data without any remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import datasets

from mm_moe.batch import Sample
from mm_moe.data.collate import Missing, presence
from mm_moe.data.schema import DataSource
from mm_moe.errors import DataError


class CompleteRows(DataSource):
    """A data set whose training split is its rows with every modality; other splits are as before.

    Rows that lack something by nature and rows from which the protocol takes something are left
    out alike: of real data nobody could tell which is which. Counting them is one pass over the
    training split.

    Args:
        source: the data set.
        split: its training split.
        missing: the protocol of that split.

    Raises:
        DataError: no row is left.
    """

    def __init__(self, source: DataSource, *, split: str, missing: Missing | None) -> None:
        super().__init__(None if source.data_dir is None else str(source.data_dir))
        self._source, self._split, self._missing = source, split, missing
        self.name, self.modalities, self.license = source.name, source.modalities, source.license
        self.label_names, self.problem_type = source.label_names, source.problem_type
        self.task, self.unlabelled, self.remote = source.task, source.unlabelled, source.remote
        self.sequences, self.array_shapes = source.sequences, source.array_shapes
        self.private, self.left_out = source.private, source.left_out
        if not self.num_complete:
            raise DataError(
                f"--drop_incomplete true leaves no row of split {split!r} of {source.name!r}: each "
                "lacks a modality; leave it out and take a --fill."
            )

    @cached_property
    def _rows_seen(self) -> tuple[int, int]:
        """Rows of the training split, and those of them that are complete."""
        kept = [self._keeps(row) for row in self._source.stream(self._split)]
        return len(kept), sum(kept)

    @property
    def num_complete(self) -> int:
        """Training rows that are kept."""
        return self._rows_seen[1]

    @property
    def num_dropped(self) -> int:
        """Training rows that lack something."""
        return self._rows_seen[0] - self._rows_seen[1]

    def splits(self) -> tuple[str, ...]:
        """As the data set's."""
        return self._source.splits()

    def stream(self, split: str) -> datasets.IterableDataset:
        """The rows of a split, of the training split the complete ones."""
        stream = self._source.stream(split)
        return stream.filter(self._keeps) if split == self._split else stream

    def to_sample(self, row: dict[str, Any]) -> Sample:
        """As the data set's."""
        return self._source.to_sample(row)

    def size(self, split: str) -> int | None:
        """Rows of a split."""
        return self.num_complete if split == self._split else self._source.size(split)

    def index(self, split: str) -> Iterator[Sample]:
        """As the data set's, without what is left out."""
        return super().index(split) if split == self._split else self._source.index(split)

    def samples_at(self, split: str, places: Sequence[int]) -> list[Sample] | None:
        """None for the training split, whose rows have other places now."""
        return None if split == self._split else self._source.samples_at(split, places)

    def fingerprint(self) -> str:
        """Of the data set: the rows that are left follow from it and the protocol."""
        return self._source.fingerprint()

    def _keeps(self, row: dict[str, Any]) -> bool:
        sample = self._source.to_sample(row)
        left_BM = presence([sample], modalities=self.modalities, missing=self._missing)
        return bool(left_BM.all())
