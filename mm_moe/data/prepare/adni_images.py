"""ADNI's grey-matter maps: the latest scan of each participant, as the voxels of the atlas.

Files in `image/`: ADNI_G.npy, float (scans, voxels); ADNI_subj.txt, one `{PTID}_{date}` for each
row of it; BLSA_..._muse_seg_DS222.nii.gz, the atlas, whose label 150 says where the voxels are.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np

from mm_moe.errors import ConfigError, DataError

GREY = 150
AXES = (2, 0, 1)  # the published loader puts the atlas's last axis first
ATLAS = "BLSA_*_muse_seg_DS222.nii.gz"
SCAN = re.compile(r"^(?P<ptid>[^_]+_[^_]+_[^_]+)_(?:.*_)?(?P<date>\d{4}-\d{2}-\d{2}|\d{8})$")

# S scans, V voxels of grey matter


class GreyMatter:
    """The maps of a folder.

    Args:
        folder: `image/` of the download.

    Attributes:
        mask: bool, the atlas's shape; V of it are True.
        row_of: PTID -> row of its latest scan that is not all zero.
        failed: scans that are zero alone: their processing failed.

    Raises:
        ConfigError: nibabel is not installed.
        DataError: a file is missing or damaged, or the maps do not fit the atlas.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ADNI_G.npy"
        self.mask = read_atlas(folder)
        try:
            self.maps_SV = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"{self.path} cannot be read: {type(error).__name__}; is the file whole?"
            ) from error
        voxels = int(self.mask.sum())
        shape = self.maps_SV.shape
        if self.maps_SV.dtype.kind != "f" or len(shape) != 2 or shape[1] != voxels:
            raise DataError(
                f"{self.path} has shape {shape} of {self.maps_SV.dtype}; the atlas has "
                f"{voxels:,} voxels of label {GREY}, so it should be (scans, {voxels}) floats."
            )
        self.row_of, self.failed = self._latest(folder / "ADNI_subj.txt")

    def _latest(self, path: Path) -> tuple[dict[str, int], int]:
        """The row of the latest good scan of each participant."""
        try:
            names = path.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read: {type(error).__name__}.") from error
        if len(names) != len(self.maps_SV):
            raise DataError(
                f"{path} names {len(names)} scans, {self.path.name} has {len(self.maps_SV)} rows."
            )
        best: dict[str, tuple[str, int]] = {}
        failed = 0
        for row, name in enumerate(names):
            found = SCAN.match(name)
            if not found:
                raise DataError(
                    f"{path}: line {row + 1} is not PTID_DATE, such as 002_S_0001_2010-01-31."
                )
            if not self.maps_SV[row].any():
                failed += 1
                continue
            when = found["date"].replace("-", "")
            best[found["ptid"]] = max(best.get(found["ptid"], ("", 0)), (when, row))
        return {name: row for name, (_, row) in best.items()}, failed

    def spread(self, names: list[str]) -> tuple[float, float]:
        """Mean and spread of all voxels of these participants' scans; spread 1 for a constant."""
        count, total, squares = 0, 0.0, 0.0
        for name in names:
            values_V = np.asarray(self.maps_SV[self.row_of[name]], np.float64)
            if np.isfinite(values_V).all():
                count += values_V.size
                total += values_V.sum()
                squares += np.square(values_V).sum()
        mean = total / max(count, 1)
        std = float(np.sqrt(max(squares / max(count, 1) - mean**2, 0.0)))
        return float(mean), std if std > 1e-6 * max(abs(mean), 1.0) else 1.0

    def values(self, name: str) -> np.ndarray | None:
        """The map of one participant (V,), or None."""
        row = self.row_of.get(name)
        return None if row is None else np.asarray(self.maps_SV[row], np.float64)


def read_atlas(folder: Path) -> np.ndarray:
    """Where the atlas has grey matter.

    Raises:
        ConfigError: nibabel is not installed.
        DataError: no atlas, several, or none that can be read.
    """
    found = sorted(folder.glob(ATLAS))
    if len(found) != 1:
        raise DataError(f"{folder} must hold one atlas {ATLAS}; it holds {len(found)}.")
    nibabel = _need_nibabel()
    try:
        labels = np.asarray(nibabel.load(found[0]).dataobj)
    except Exception as error:  # a damaged file raises nearly anything
        raise DataError(f"{found[0]} is no image of NIfTI: {type(error).__name__}.") from error
    mask = labels == GREY
    if labels.ndim != 3 or not mask.any():
        raise DataError(f"{found[0]} has no voxel of label {GREY} in three dimensions.")
    return mask


def _need_nibabel() -> Any:
    try:
        return importlib.import_module("nibabel")
    except ImportError as error:
        raise ConfigError(
            "ADNI's atlas is a NIfTI file; install its reader with `pip install -e '.[clinical]'`."
        ) from error
