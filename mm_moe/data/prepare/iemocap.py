"""IEMOCAP (Busso et al., 2008) as the features of MMIN: four emotions, ten folds.

Layout: `A/comparE.h5`, `V/denseface.h5`, `L/bert_large.h5` (utterance name -> float array (T, D);
D = 130, 342, 1024) and `target/<fold>/{trn,val,tst}_{label,int2name}.npy` (one-hot (N, 4) or class
numbers (N,); names as bytes (N, 1) or (N,)). `A/comparE_mean_std.h5` is not read: mean and spread
are computed from the training rows. N samples, T steps, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mm_moe.data.prepare.hdf5 import need_h5py
from mm_moe.data.prepare.raw import SEQUENCES, RawDataSet, RawRow
from mm_moe.data.prepare.sentiment import join_id
from mm_moe.data.schema import SINGLE_LABEL
from mm_moe.errors import DataError

NAMES = {"train": "trn", "validation": "val", "test": "tst"}  # our splits, theirs
FILES = {
    "text": ("L", "bert_large.h5"),
    "audio": ("A", "comparE.h5"),
    "vision": ("V", "denseface.h5"),
}


class IemocapRaw(RawDataSet):
    """The published folder, one fold of it.

    Args:
        source: the folder.
        fold: the fold, 1 to 10. Published code often reports fold 1 alone; the full protocol is the
            mean over all ten.

    Raises:
        ConfigError: h5py is not installed.
    """

    name = "iemocap"
    problem_type = SINGLE_LABEL
    task = SINGLE_LABEL
    license = "IEMOCAP (USC SAIL, 2008): under the release form of its authors, not to be shared"
    notes = (
        "The files number the classes and do not name them.",
        "Zero steps at either end of a sequence are padding and are cut off.",
    )

    def __init__(self, source: Path, *, fold: int = 1) -> None:
        super().__init__(source)
        self.kinds = dict.fromkeys(FILES, SEQUENCES)
        self.fold = fold
        self.paths = {name: self.need(*parts) for name, parts in FILES.items()}
        targets = {
            split: [self.need("target", str(fold), f"{theirs}_{what}.npy") for what in PARTS]
            for split, theirs in NAMES.items()
        }
        self.targets = [path for paths in targets.values() for path in paths]
        self.records = {split: _read_target(*paths) for split, paths in targets.items()}
        count = 1 + max(max(labels, default=0) for _, labels in self.records.values())
        self.label_names = tuple(f"emotion {n}" for n in range(max(count, 4)))
        self.h5py = need_h5py("IEMOCAP's features")

    def splits(self) -> tuple[str, ...]:
        """Train ("trn"), validation ("val") and test ("tst") of the fold."""
        return tuple(NAMES)

    def indices(self) -> list[Path]:
        """Labels and names of the fold, and the three files of features."""
        return [*self.targets, *self.paths.values()]

    @property
    def options(self) -> dict[str, Any]:
        """Which fold was read."""
        return {"fold": self.fold}

    def rows(self, split: str) -> Iterator[RawRow]:
        """One row for each utterance; one that a file of features lacks is missing there."""
        try:
            files = {name: self.h5py.File(path, "r") for name, path in self.paths.items()}
        except OSError as error:
            raise DataError(f"a feature file of {self.source} is no readable HDF5 file.") from error
        try:
            for utterance, label in zip(*self.records[split], strict=True):
                payload = {n: file[utterance][()] for n, file in files.items() if utterance in file}
                yield RawRow(utterance, payload, label)
        finally:
            for file in files.values():
                file.close()


PARTS = ("int2name", "label")


def _read_target(names_path: Path, labels_path: Path) -> tuple[list[str], list[int]]:
    """Utterance names and class numbers."""
    try:
        names, labels = (np.load(path, allow_pickle=False) for path in (names_path, labels_path))
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{names_path.parent}: names or labels are no plain .npy array.") from error
    if labels.ndim == 2:
        labels = labels.argmax(axis=1)
    if len(names) != len(labels) or labels.ndim != 1:
        raise DataError(
            f"{labels_path} has shape {labels.shape}, {names_path.name} {len(names)} names."
        )
    return [join_id(name) for name in names], [int(label) for label in labels]
