"""Predictions per sample as a file: what paired comparisons of finished models need.

N samples, C classes (or labels), M modalities. One `.npz` per model and split, without pickles.
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mm_moe.errors import DataError
from mm_moe.training.predict import Predictions


def hash_ids(ids: list[str], *, dataset: str) -> np.ndarray:
    """128-bit hashes of sample ids as texts (N,): ids of clinical data may name a patient.

    They pair the rows of two models, and hide ids that cannot be guessed. Who can list all ids can
    hash them, too, so they are no anonymisation.
    """
    key = hashlib.blake2b(dataset.encode(), digest_size=32).digest()
    hashes = [hashlib.blake2b(i.encode(), digest_size=16, key=key).hexdigest() for i in ids]
    return np.array(hashes, dtype="<U32")


@dataclass
class PredictionFile:
    """The predictions of one model on one split under several test conditions.

    Attributes:
        ids: hashed ids (N,), in the order of the true ids.
        groups: hashed groups (N,): rows of one group are no independent samples.
        labels: condition -> (N,) or (N, C), as in `Predictions`. They differ between conditions
            only where a row has nothing left, for then it is not counted.
        logits: condition -> float32 (N, C).
    """

    ids: np.ndarray
    groups: np.ndarray
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    logits: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(
        cls, found: dict[str, Predictions], *, group_of: dict[str, str], dataset: str
    ) -> PredictionFile:
        """Collect predictions by condition.

        Args:
            found: condition -> predictions.
            group_of: sample id -> its group, which may be the id itself.
            dataset: the source's name, key of the hashes.

        Raises:
            DataError: the conditions do not cover the same samples.
        """
        first = next(iter(found.values()))
        for condition, other in found.items():
            if other.ids != first.ids:
                raise DataError(f"condition {condition!r} covers other samples than the first.")
        return cls(
            hash_ids(first.ids, dataset=dataset),
            hash_ids([group_of[i] for i in first.ids], dataset=dataset),
            {condition: one.labels for condition, one in found.items()},
            {condition: np.asarray(one.logits, np.float32) for condition, one in found.items()},
        )

    def save(self, path: Path) -> None:
        """Write aside, then rename: a file that exists is whole."""
        aside = path.with_name(f"{path.stem}.tmp.npz")
        entries = {f"logits {condition}": values for condition, values in self.logits.items()}
        entries |= {f"labels {condition}": values for condition, values in self.labels.items()}
        np.savez_compressed(aside, allow_pickle=False, ids=self.ids, groups=self.groups, **entries)
        aside.replace(path)

    @classmethod
    def load(cls, path: Path) -> PredictionFile:
        """Read a file that `save` wrote.

        Raises:
            DataError: the file is missing, damaged, or no such file.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                named = {name: file[name] for name in file.files}
            labels, logits = (_with_prefix(named, f"{kind} ") for kind in ("labels", "logits"))
            return cls(named["ids"], named["groups"], labels, logits)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{path} holds no predictions ({error}); score the run again."
            ) from error


def _with_prefix(named: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): value for k, value in named.items() if k.startswith(prefix)}
