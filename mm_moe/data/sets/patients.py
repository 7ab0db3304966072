"""Data sets of patients that fit into memory: splits by patient, pseudonyms, random access."""

from __future__ import annotations

import hashlib
import itertools
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from mm_moe.batch import PackedArray, Sample
from mm_moe.data.chance import draws
from mm_moe.data.prepare.raw import SPLITS
from mm_moe.data.privacy import content_key, pseudonym
from mm_moe.data.reading import file_sha256, reading
from mm_moe.data.schema import ONE_VALUE, DataSource, check_label
from mm_moe.errors import ConfigError, DataError
from mm_moe.registry import nearest


@dataclass(frozen=True)
class Patients:
    """What was read of a data set.

    Attributes:
        split_of: split -> its patients, in order.
        labels: patient -> label.
        payloads: modality -> patient -> raw value, for those that have it.
        sequences: as `DataSource.sequences`.
        array_shapes: as `DataSource.array_shapes`.
        left_out: why patients are in no split -> how many.
    """

    split_of: Mapping[str, list[str]]
    labels: Mapping[str, Any]
    payloads: Mapping[str, Mapping[str, Any]]
    sequences: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    array_shapes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)


class PatientData(DataSource):
    """Base of such a data set: an adapter reads, everything else is here.

    Attributes:
        paths: the files that are read.
        leaks: column -> why it is never an input.
    """

    private = True
    paths: list[Path]
    leaks: Mapping[str, str]

    @abstractmethod
    def read(self) -> Patients:
        """Read the files."""

    @cached_property
    def patients(self) -> Patients:
        """What was read, once for each process.

        Raises:
            DataError: a patient in two splits, a label outside its classes, or nothing to train on.
        """
        with reading(self.name):
            found = self.read()
        check_apart(found.split_of, name=self.name)
        self._check_labels(found)
        self._check_training(found)
        return found

    def _check_labels(self, found: Patients) -> None:
        outputs = 1 if self.problem_type in ONE_VALUE else len(self.label_names)
        for name in itertools.chain(*found.split_of.values()):
            check_label(
                found.labels[name],
                problem_type=self.problem_type,
                num_labels=outputs,
                sample_id=pseudonym(name, key=self._key),
            )

    def _check_training(self, found: Patients) -> None:
        """That some training patients have labels, and some have each modality."""
        train = found.split_of[SPLITS[0]]
        if all(found.labels[name] is None for name in train):
            raise DataError(f"{self.name}: no patient of the training split has a label.")
        for modality in self.modalities:
            if found.payloads[modality].keys().isdisjoint(train):
                raise DataError(
                    f"{self.name}: none of the {len(train):,} training patients has {modality!r}; "
                    "are its ids those of the labels?"
                )

    def __getstate__(self) -> dict[str, Any]:
        """Without what was read: a worker reads it again."""
        return {key: value for key, value in vars(self).items() if key != "patients"}

    @property
    def sequences(self) -> Mapping[str, Mapping[str, Any]]:  # type: ignore[override]
        """From the training patients."""
        return self.patients.sequences

    @property
    def array_shapes(self) -> Mapping[str, Mapping[str, Any]]:  # type: ignore[override]
        """From the data."""
        return self.patients.array_shapes

    @property
    def left_out(self) -> Mapping[str, int]:  # type: ignore[override]
        """From the data."""
        return self.patients.left_out

    def splits(self) -> tuple[str, ...]:
        """Train, validation and test."""
        return SPLITS

    def stream(self, split: str) -> datasets.IterableDataset:
        """The patients of a split."""
        rows = self.patients.split_of[self.check_split(split)]
        return datasets.IterableDataset.from_generator(partial(_rows, rows))

    def to_sample(self, row: dict[str, Any]) -> Sample:
        """All that there is of a patient, under a pseudonym."""
        name = row["patient"]
        found = self.patients
        payload = {
            modality: found.payloads[modality][name]
            for modality in self.modalities
            if name in found.payloads[modality]
        }
        return Sample(pseudonym(name, key=self._key), payload, found.labels[name])

    def samples_at(self, split: str, places: Sequence[int]) -> list[Sample]:
        """Patients by their places."""
        names = self.patients.split_of[self.check_split(split)]
        return [self.to_sample({"patient": names[place]}) for place in places]

    def size(self, split: str) -> int:
        """Patients of a split."""
        return len(self.patients.split_of[self.check_split(split)])

    def fingerprint(self) -> str:
        """sha256 over the files' own."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(file_sha256(path).encode())
        return digest.hexdigest()

    @cached_property
    def _key(self) -> bytes:
        with reading(self.name):
            return content_key(self.paths)


def _rows(names: list[str]) -> Iterator[dict[str, str]]:
    for name in names:
        yield {"patient": name}


def check_apart(split_of: Mapping[str, Sequence[str]], *, name: str) -> None:
    """Check that no patient is in two splits, or twice in one.

    Raises:
        DataError: some are; the message tells how many and where, and names nobody.
    """
    first: dict[str, str] = {}
    shared: dict[tuple[str, str], int] = {}
    for split, patients in split_of.items():
        for patient in patients:
            other = first.setdefault(patient, split)
            if other != split:
                shared[other, split] = shared.get((other, split), 0) + 1
        if len(set(patients)) != len(patients):
            raise DataError(f"{name}: a patient is in the split {split!r} twice.")
    for (one, other), count in shared.items():
        raise DataError(
            f"{name}: {count:,} patients are in {one!r} and in {other!r}; a patient must be in "
            "one split only, or the scores tell of patients that the model knows."
        )


def folds(
    patients: Sequence[str], labels: Mapping[str, Any], *, count: int, dataset: str, seed: int
) -> dict[str, int]:
    """Patient -> its fold: a keyed order within each class, dealt in turn.

    So folds are stratified, and a patient's fold depends on ids and classes alone.
    """
    ranked = sorted(
        patients,
        key=lambda name: (
            str(labels[name]),
            draws(name, purpose="fold", dataset=dataset, seed=seed),
        ),
    )
    return {name: place % count for place, name in enumerate(ranked)}


def fold_splits(fold_of: Mapping[str, int], *, fold: int, count: int) -> dict[str, list[str]]:
    """Test is fold `fold`, validation the one behind it, training the rest, in ids' order."""
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in sorted(fold_of):
        place = (fold_of[name] - fold) % count
        splits[{0: "test", 1: "validation"}.get(place, "train")].append(name)
    return splits


def vectors(names: Sequence[str], values_ND: np.ndarray) -> dict[str, PackedArray]:
    """Patient -> row, without those of which nothing is known."""
    known_N = ~np.isnan(values_ND).all(1)
    rows = np.ascontiguousarray(values_ND, dtype="<f4")
    return {
        name: PackedArray(rows[row].tobytes(), "float32", (rows.shape[1],))
        for row, name in enumerate(names)
        if known_N[row]
    }


def check_choice(option: str, value: Any, known: Sequence[str], *, name: str) -> None:
    """Refuse an option that is none of the known words.

    Raises:
        ConfigError: names the nearest ones.
    """
    if value not in list(known):
        words = nearest(str(value), list(known))
        raise ConfigError(f"{name}: unknown {option} {value!r}; {words}")


def check_whole(option: str, value: Any, *, name: str) -> None:
    """Refuse an option that is no whole number.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}: {option} ({value!r}) must be a whole number.")


def table_entry(width: int) -> dict[str, Any]:
    """The entry of `DataSource.array_shapes` for a table."""
    return {"shape": [width], "scale": 1.0, "form": "table"}
