"""The contract of a data set: streams of raw rows, and one function from a row to a `Sample`.

An adapter never decodes and never batches. It names its splits, modalities and classes, streams
rows in a fixed order through `datasets`, and turns a row into a `Sample`; labels are checked here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import datasets

from mm_moe.batch import IGNORED_LABEL, Sample
from mm_moe.data.retrying import Remote
from mm_moe.errors import ConfigError, DataError
from mm_moe.registry import nearest

SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"
SURVIVAL = "survival"  # a label is (time, event): 1 for an event at that time, 0 for censored
NO_LABEL = "none"
PROBLEM_TYPES = (SINGLE_LABEL, MULTI_LABEL, REGRESSION, SURVIVAL, NO_LABEL)
ONE_VALUE = (REGRESSION, SURVIVAL)  # a head gives one number, whatever the label has

# Families of scores; where a data set names none, its problem type is its family.
BINARY, BINARY_AUPRC = "binary", "binary_auprc"
CLINICAL_BINARY, CLINICAL_CLASSES = "clinical_binary", "clinical_classes"
KNEE = "knee_findings"  # four labels: abnormal, meniscus tear, cruciate ligament, cartilage
VQA = "vqa"  # soft targets: {class: share}
SENTIMENT_MOSI, SENTIMENT_SIMS = "sentiment_mosi", "sentiment_sims"
TASKS = {  # family -> the problem type that its model is trained on
    **{name: name for name in PROBLEM_TYPES},
    BINARY: SINGLE_LABEL,
    BINARY_AUPRC: SINGLE_LABEL,
    CLINICAL_BINARY: SINGLE_LABEL,
    CLINICAL_CLASSES: SINGLE_LABEL,
    KNEE: MULTI_LABEL,
    VQA: MULTI_LABEL,
    SENTIMENT_MOSI: REGRESSION,
    SENTIMENT_SIMS: REGRESSION,
}


class DataSource(ABC):
    """One data set, built as `SourceClass(data_dir, **options)`; picklable for loader workers.

    Attributes:
        name: key of its masks and splits; never changes once results exist.
        modalities: what a payload can hold, in order.
        label_names: class names; empty without classes.
        problem_type: one of `PROBLEM_TYPES`.
        license: who may do what with the data, for the model card.
        task: the family of scores, one of `TASKS`; None: that of the problem type.
        unlabelled: split -> why it cannot be scored.
        sequences: modality -> {"width", "length", "mean", "std"} where the payload is a sequence of
            features (an array (T, width), or its float32 bytes). An entry with the key "events" is
            that of measurements at irregular times (see `mm_moe.data.events`).
        array_shapes: modality -> {"shape", "scale"} where the payload is a `PackedArray` of one
            shape, whose values a model divides by the scale. A third key, "form", may say what the
            array is: "table" (D,), "dosages" (D,) uint8 allele counts, or "volume" (1, Z, X, Y).
        private: the rows are of patients: ids of samples are pseudonyms already, and no log, report
            or checkpoint may hold anything of a row.
        left_out: why rows of the download are in no split -> how many; never which.
        remote: how the data's addresses are read; None: in the usual way.
    """

    name: str
    modalities: tuple[str, ...]
    label_names: tuple[str, ...]
    problem_type: str
    license: str
    task: str | None = None
    unlabelled: Mapping[str, str] = MappingProxyType({})
    sequences: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    array_shapes: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    remote: Remote | None = None
    private: bool = False
    left_out: Mapping[str, int] = MappingProxyType({})

    def __init__(self, data_dir: str | None = None) -> None:
        self.data_dir = None if data_dir is None else Path(data_dir).expanduser()

    @abstractmethod
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that exist, for example ("train", "validation", "test")."""

    @abstractmethod
    def stream(self, split: str) -> datasets.IterableDataset:
        """Raw rows of a split in a fixed order, nothing decoded.

        Raises:
            DataError: the split does not exist; the message lists those that do.
        """

    @abstractmethod
    def to_sample(self, row: dict[str, Any]) -> Sample:
        """One row as a sample; a modality that the row lacks is absent from the payload.

        Raises:
            DataError: the label does not belong to the classes; the message names the sample.
        """

    @abstractmethod
    def size(self, split: str) -> int | None:
        """The exact number of rows of a split, or None where only a full pass would tell."""

    def index(self, split: str) -> Iterator[Sample]:
        """The samples of a split for their ids and labels; a set may leave the payloads unread.

        Raises:
            DataError: as `stream` and `to_sample`.
        """
        yield from map(self.to_sample, self.stream(split))

    def samples_at(self, split: str, places: Sequence[int]) -> list[Sample] | None:
        """Samples by their places in the order of `stream`, of a set with random access.

        Returns:
            None: the set has none, whatever the places.
        """
        return None

    @abstractmethod
    def fingerprint(self) -> str:
        """A sha256 of the content, or of the source and its revision, for the run's record."""

    def line(
        self, split: str, *, seed: int, shuffle_buffer: int, start: int
    ) -> Iterator[tuple[int, dict[str, Any]]] | None:
        """The endless order of a set that has one of its own, as (epoch of the row, row).

        Args:
            split: a split.
            seed: of the order.
            shuffle_buffer: rows that a shuffle may hold.
            start: rows of the order to leave out.

        Returns:
            None: shuffled passes over `stream`, one after the other.
        """
        return None

    def check_split(self, split: str) -> str:
        """Return `split` if it exists.

        Raises:
            DataError: it does not; the message lists the splits that do.
        """
        known = self.splits()
        if split not in known:
            raise DataError(
                f"data set {self.name!r} has no split {split!r}; it has: {', '.join(known)}."
            )
        return split


def label_index(value: str, label_names: tuple[str, ...], *, sample_id: str) -> int:
    """Index of the class named `value`.

    Raises:
        DataError: no class has this name; the message names the sample and the nearest classes.
    """
    try:
        return label_names.index(value)
    except ValueError:
        raise DataError(
            f"sample {sample_id!r} has the label {value!r}, which is none of the "
            f"{len(label_names)} classes; {nearest(value, list(label_names))}"
        ) from None


def check_label(label: Any, *, problem_type: str, num_labels: int, sample_id: str) -> None:
    """Check one label against its problem type; None (no label known) always passes.

    Raises:
        DataError: the label is of the wrong kind, outside the classes, or not finite.
    """
    if label is None or problem_type == NO_LABEL:
        return
    where = f"label of sample {sample_id!r}"
    if problem_type == SINGLE_LABEL:
        if isinstance(label, bool) or not isinstance(label, int):
            raise DataError(f"the {where} must be a class index, not {type(label).__name__}.")
        if not 0 <= label < num_labels:
            raise DataError(
                f"the {where} is {label}, outside the {num_labels} classes 0 to {num_labels - 1}; "
                "correct the row or list all classes."
            )
    elif problem_type == MULTI_LABEL and isinstance(label, Mapping):
        for index, share in label.items():
            if not (isinstance(index, int) and 0 <= index < num_labels and 0 <= share <= 1):
                raise DataError(
                    f"the {where} gives {share} to class {index!r}; it must give shares from 0 to "
                    f"1 to classes 0 to {num_labels - 1}."
                )
    elif problem_type == MULTI_LABEL:
        if len(label) != num_labels or any(value not in (0, 1) for value in label):
            raise DataError(f"the {where} must be a list of {num_labels} zeros and ones.")
    elif problem_type == REGRESSION:
        if not math.isfinite(label):
            raise DataError(f"the {where} is {label}; leave it empty where it is not known.")
        if label == IGNORED_LABEL:
            raise DataError(
                f"the {where} is {IGNORED_LABEL}, which marks rows without a label; rescale it."
            )
    elif problem_type == SURVIVAL:
        _check_survival(label, where)
    else:
        raise ConfigError(f"unknown problem type {problem_type!r}; {nearest_type(problem_type)}")


def _check_survival(label: Any, where: str) -> None:
    if not isinstance(label, Sequence) or len(label) != 2:
        raise DataError(f"the {where} must be (time, event), two numbers.")
    time, event = label
    if not math.isfinite(time) or time < 0:
        raise DataError(f"the {where} has a time that is no number of at least 0; correct it.")
    if event not in (0, 1):
        raise DataError(
            f"the {where} must say 1 for an event at its time or 0 for a censored row; leave the "
            "label empty where neither is known."
        )


def dense_label(label: Any, num_labels: int) -> Any:
    """A sparse soft label as the list of its shares; any other label as it is."""
    if not isinstance(label, Mapping):
        return label
    shares = [0.0] * num_labels
    for index, share in label.items():
        shares[index] = float(share)
    return shares


def nearest_type(problem_type: str) -> str:
    """The known problem types closest to a misspelt one."""
    return nearest(problem_type, list(PROBLEM_TYPES))
