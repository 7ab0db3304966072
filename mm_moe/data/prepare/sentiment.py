"""Sentiment of speakers from features of words, voice and face: CMU-MOSI, CMU-MOSEI, CH-SIMS.

Layout: one pickle of {"train", "valid", "test"} -> {"text", "audio", "vision": float arrays
(N, T, D) with their own T and D; "labels" (N, 1, 1) or "regression_labels" (N,); "id" (N,) or
(N, k), if any; further keys, which are not read}. N samples, T steps, D width.

Steps that are zero throughout are padding where they stand at an end. A sequence of zeros alone is
how these files say that there is nothing: the row then lacks the modality.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mm_moe.data.prepare.pickles import read_arrays
from mm_moe.data.prepare.raw import SEQUENCES, RawDataSet, RawRow
from mm_moe.data.schema import REGRESSION, SENTIMENT_MOSI, SENTIMENT_SIMS
from mm_moe.errors import DataError

NAMES = {"train": "train", "validation": "valid", "test": "test"}  # our splits, theirs
MODALITIES = ("text", "audio", "vision")


class SentimentRaw(RawDataSet):
    """A pickle of feature sequences with a sentiment in [-limit, limit].

    Args:
        source: the folder with the pickle.
        file: its name; by default the first of the published names that is there, else the only
            `.pkl` file.

    Raises:
        DataError: no such file, or its content is not in the layout.
    """

    files: ClassVar[tuple[str, ...]]
    label_keys: ClassVar[tuple[str, ...]] = ("labels", "regression_labels")
    limit: ClassVar[float]
    problem_type = REGRESSION
    label_names = ()
    notes = (
        "-inf in the audio becomes 0, as the field's loaders do; the values are counted.",
        "Zero steps at either end of a sequence are padding and are cut off.",
        "A sequence of zeros alone counts as a missing modality.",
    )

    def __init__(self, source: Path, *, file: str | None = None) -> None:
        super().__init__(source)
        self.kinds = dict.fromkeys(MODALITIES, SEQUENCES)
        self.path = self.need(file) if file else self._find()
        content = read_arrays(self.path)
        self.content = {split: self._split(content, theirs) for split, theirs in NAMES.items()}

    def _find(self) -> Path:
        """The pickle under one of its names, or the only one."""
        for name in self.files:
            if (self.source / name).is_file():
                return self.source / name
        found = sorted(self.source.glob("*.pkl"))
        if len(found) == 1:
            return found[0]
        raise DataError(
            f"{str(self.source)!r} is not in the layout of {self.name!r}: there is no "
            f"{self.files[0]} (nor {', '.join(self.files[1:])}), and {len(found)} other .pkl "
            'files; name one with --options \'{"file": "NAME.pkl"}\'.'
        )

    def _split(self, content: Any, theirs: str) -> dict[str, np.ndarray]:
        """The arrays of one split, checked against each other."""
        part = content.get(theirs) if isinstance(content, dict) else None
        if not isinstance(part, dict):
            raise DataError(f"{self.path} has no split {theirs!r}.")
        label = next((key for key in self.label_keys if key in part), self.label_keys[0])
        arrays = {}
        for key in (*MODALITIES, label):
            if not isinstance(part.get(key), np.ndarray):
                raise DataError(f"{self.path}: {theirs}.{key} is not there, or no array.")
            arrays[key] = part[key]
        count = len(arrays[label])
        for key in MODALITIES:
            if arrays[key].ndim != 3 or len(arrays[key]) != count:
                raise DataError(
                    f"{self.path}: {theirs}.{key} has shape {arrays[key].shape}; it should be "
                    f"({count}, T, D), a row for each of the {count} labels."
                )
        labels = arrays.pop(label)
        if labels.dtype.kind not in "fiu" or labels.size != count:
            raise DataError(
                f"{self.path}: {theirs}.{label} has shape {labels.shape} of {labels.dtype}; it "
                f"should hold one number a row."
            )
        # (N, 1, 1) in MOSI and MOSEI, (N,) in CH-SIMS: never a column against a row again.
        arrays["labels"] = labels.reshape(-1)
        arrays["ids"] = np.asarray(part.get("id", [f"{theirs}-{n}" for n in range(count)]))
        if len(arrays["ids"]) != count:
            raise DataError(f"{self.path}: {theirs}.id has {len(arrays['ids'])} of {count} ids.")
        return arrays

    def splits(self) -> tuple[str, ...]:
        """Train, validation ("valid") and test."""
        return tuple(NAMES)

    def indices(self) -> list[Path]:
        """The pickle."""
        return [self.path]

    @property
    def options(self) -> dict[str, Any]:
        """Which file was read."""
        return {"file": self.path.name}

    def rows(self, split: str) -> Iterator[RawRow]:
        """One row for each label."""
        arrays = self.content[split]
        for n, value in enumerate(arrays["labels"]):
            row_id = join_id(arrays["ids"][n])
            label = None if np.isnan(value) else float(value)
            if label is not None and abs(label) > self.limit + 1e-6:
                fault = f"wrong label: {label:g} is outside [-{self.limit:g}, {self.limit:g}]"
                yield RawRow(row_id, fault=fault)
                continue
            audio_TD, mended = without_minus_infinity(arrays["audio"][n])
            payload = {"text": arrays["text"][n], "audio": audio_TD, "vision": arrays["vision"][n]}
            repairs = {"audio -inf to 0": mended} if mended else {}
            yield RawRow(row_id, payload, label, repairs=repairs)


def without_minus_infinity(array_TD: np.ndarray) -> tuple[np.ndarray, int]:
    """The array with 0 for -inf, and how many there were."""
    if array_TD.dtype.kind != "f":
        return array_TD, 0
    wrong_TD = np.isneginf(array_TD)
    return np.where(wrong_TD, 0.0, array_TD), int(wrong_TD.sum())


def join_id(value: Any) -> str:
    """An id cell as a text; MOSEI's (video, start, end) are joined by slashes."""
    parts = np.atleast_1d(value).tolist()
    return "/".join(part.decode() if isinstance(part, bytes) else str(part) for part in parts)


class MosiRaw(SentimentRaw):
    """CMU-MOSI (Zadeh et al., 2016): English, labels in [-3, 3]."""

    name = "cmu_mosi"
    task = SENTIMENT_MOSI
    limit = 3.0
    files = ("mosi_data.pkl", "mosi.pkl", "unaligned_50.pkl", "aligned_50.pkl")
    license = "CMU-MOSI (Zadeh et al., 2016): for research, under the terms of the CMU SDK"


class MoseiRaw(SentimentRaw):
    """CMU-MOSEI (Zadeh et al., 2018): English, labels in [-3, 3]."""

    name = "cmu_mosei"
    task = SENTIMENT_MOSI
    limit = 3.0
    files = ("mosei_senti_data.pkl", "mosei.pkl", "unaligned_50.pkl", "aligned_50.pkl")
    license = "CMU-MOSEI (Zadeh et al., 2018): for research, under the terms of the CMU SDK"


class SimsRaw(SentimentRaw):
    """CH-SIMS (Yu et al., 2020): Chinese, labels in [-1, 1], one number a row."""

    name = "ch_sims"
    task = SENTIMENT_SIMS
    limit = 1.0
    label_keys = ("regression_labels",)
    files = ("unaligned_39.pkl", "sims.pkl")
    license = "CH-SIMS (Yu et al., 2020): for research"
