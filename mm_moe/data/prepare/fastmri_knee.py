"""fastMRI knee slices with four findings: magnitude and phase of the complex image.

Layout: `metadata_knee.csv` (volume_id, slice_id, labels, data_split, ...) and
`<volume>/knee_singlecoil_<volume>_<slice>.h5` with `sc_kspace` complex (Y, X), as the published
experiments have them and as `launch/prepare_data.py fastmri_slices` writes them.

The image is the centred inverse Fourier transform of k-space; magnitude and phase are the middle
320 x 320 of it, not normalised. Both are stored as float32 arrays, 410 kB each.

Y rows, X columns.
"""

from __future__ import annotations

import ast
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mm_moe.data.chance import draws
from mm_moe.data.kspace import add_noise, centred_image, magnitude_and_phase
from mm_moe.data.prepare.fastmri_slices import METADATA
from mm_moe.data.prepare.hdf5 import need_h5py
from mm_moe.data.prepare.knee_labels import FINDINGS, SPLIT_NAMES, four_labels, split_volumes
from mm_moe.data.prepare.raw import ARRAYS, SPLITS, RawDataSet, RawRow
from mm_moe.data.schema import KNEE, MULTI_LABEL
from mm_moe.errors import ConfigError, DataError

SIDE = 320
NEEDED = ("volume_id", "slice_id", "labels", "data_split")


class FastmriKneeRaw(RawDataSet):
    """The folder of slices.

    Args:
        source: the folder.
        split: "metadata": the column data_split; "sorted": dealt again from the sorted volumes,
            for tables of the published code, whose split changed with every run.
        noise: per cent of the largest magnitude that Gaussian noise in the complex image has as its
            spread. A training slice draws its own from below that number; the others take it whole.
            The noise belongs to the slice: it is the same in every epoch.

    Raises:
        ConfigError: an unknown split, noise outside 0 to 100, or h5py is not installed.
        DataError: the table is missing or lacks a column.
    """

    name = "fastmri_knee"
    problem_type = MULTI_LABEL
    task = KNEE
    label_names = FINDINGS
    license = "fastMRI (NYU, data use agreement) with fastMRI+ annotations (MIT); not to be shared"
    notes = (
        "A slice of an annotated volume without a box has no finding.",
        "Slices of one volume are in one split and are no independent samples (group).",
        "Magnitude and phase are not normalised, as in the published experiments.",
    )

    def __init__(self, source: Path, *, split: str = "metadata", noise: float = 0.0) -> None:
        super().__init__(source)
        if split not in ("metadata", "sorted"):
            raise ConfigError(f"fastmri_knee: split is {split!r}; take metadata or sorted.")
        if not 0 <= noise <= 100:
            raise ConfigError(f"fastmri_knee: noise ({noise}) is a percentage from 0 to 100.")
        self.kinds = {"magnitude": ARRAYS, "phase": ARRAYS}
        self.split, self.noise = split, noise
        self.h5py = need_h5py("fastMRI's slices")
        self.path = self.need(METADATA)
        self.records = self._deal(_read(self.path))

    def _deal(self, lines: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
        """Split -> its lines; those of volumes that nobody annotated are in none."""
        theirs = {name: split for split, name in SPLIT_NAMES.items()}
        lines = [line for line in lines if line["data_split"] in theirs]
        if not lines:
            raise DataError(f"{self.path} has no line with a data_split such as train_class.")
        if self.split == "sorted":
            split_of = split_volumes(sorted({line["volume_id"] for line in lines}))
        found: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
        for line in lines:
            dealt = self.split == "sorted"
            found[split_of[line["volume_id"]] if dealt else theirs[line["data_split"]]].append(line)
        return found

    def splits(self) -> tuple[str, ...]:
        """Train, validation and test, by volumes."""
        return SPLITS

    def indices(self) -> list[Path]:
        """The table."""
        return [self.path]

    @property
    def options(self) -> dict[str, Any]:
        """Split and noise."""
        return {"split": self.split, "noise": self.noise}

    def rows(self, split: str) -> Iterator[RawRow]:
        """One row for each slice."""
        for line in self.records[split]:
            volume, number = line["volume_id"], line["slice_id"]
            name = f"{volume}-{number}"
            try:
                label = four_labels(finding for finding in _listed(line["labels"]) if finding)
                kspace_YX = self._kspace(volume, number)
            except (DataError, ValueError) as error:
                yield RawRow(name, fault=str(error))
                continue
            magnitude, phase = self._image(kspace_YX, name, split)
            payload: dict[str, Any] = {"magnitude": magnitude, "phase": phase}
            yield RawRow(name, payload, label, group=volume, mask_key=name)

    def _kspace(self, volume: str, number: str) -> np.ndarray:
        path = self.source / volume / f"knee_singlecoil_{volume}_{number}.h5"
        if Path(volume).name != volume or not number.isdigit():
            raise DataError("volume_id or slice_id is no name of a file")
        try:
            with self.h5py.File(path, "r") as file:
                if "sc_kspace" not in file:
                    raise DataError("no sc_kspace; magnitude and phase need a single coil")
                kspace_YX = np.asarray(file["sc_kspace"][()])
        except (OSError, KeyError, TypeError) as error:  # a link or a group where an array belongs
            raise DataError(f"slice file is missing or damaged: {path.name}") from error
        if kspace_YX.ndim != 2 or min(kspace_YX.shape) < SIDE or kspace_YX.dtype.kind != "c":
            raise DataError(f"sc_kspace has shape {kspace_YX.shape} of {kspace_YX.dtype}")
        return kspace_YX

    def _image(self, kspace_YX: np.ndarray, name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
        image_YX = centred_image(kspace_YX)
        if self.noise:
            share, seed = draws(name, purpose="noise", dataset=self.name)
            percent = self.noise * (share if split == "train" else 1)
            image_YX = add_noise(image_YX, percent=percent, seed=int(seed * 2**53))
        return magnitude_and_phase(image_YX, SIDE)


def _read(path: Path) -> list[dict[str, str]]:
    """The lines of the table."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            lost = [name for name in NEEDED if name not in (table.fieldnames or ())]
            if lost:
                raise DataError(f"{path} has no column {lost[0]!r}.")
            return list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {type(error).__name__}.") from error


def _listed(cell: str) -> list[Any]:
    """A cell such as "['Meniscus Tear']" or "[None]", as data."""
    try:
        value = ast.literal_eval(cell)
    except (ValueError, SyntaxError) as error:
        raise DataError("labels are no list") from error
    if not isinstance(value, list) or not all(isinstance(v, str | None) for v in value):
        raise DataError("labels are no list of texts")
    return value
