"""Vectors that are volumes: the mask beside the shards, and the way back.

A brain of 91 x 109 x 91 voxels with 84,090 of grey matter is stored as those 84,090 numbers. The
file `MODALITY_mask.npy` says where they go; it is the same for all rows, so it tells of nobody.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from mm_moe.batch import PackedArray
from mm_moe.data.reading import file_sha256
from mm_moe.errors import DataError


def write_mask(folder: Path, modality: str, mask: np.ndarray, axes: tuple[int, ...]) -> dict:
    """Write the mask and return what the record of the modality says of it.

    Returns:
        {"shape", "mask", "mask_sha256", "axes"}; the shape is that of the volume with its channel.
    """
    name = f"{modality}_mask.npy"
    np.save(folder / name, mask.astype(bool), allow_pickle=False)
    shape = [1, *(mask.shape[axis] for axis in axes)]
    return {
        "shape": shape,
        "mask": name,
        "mask_sha256": file_sha256(folder / name),
        "axes": list(axes),
    }


class VolumeReader:
    """Cells of one modality to volumes.

    Args:
        folder: of the prepared data.
        about: the record of the modality.

    Raises:
        DataError: the mask is missing, damaged, or of another shape than the record says.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        path = folder / Path(about["mask"]).name
        if not path.is_file() or file_sha256(path) != about["mask_sha256"]:
            raise DataError(f"{path} is missing or was changed; prepare the data again.")
        mask = np.load(path, allow_pickle=False)
        self.axes, self.shape = tuple(about["axes"]), tuple(about["shape"])
        if [1, *(mask.shape[axis] for axis in self.axes)] != list(self.shape):
            raise DataError(f"{path} has shape {mask.shape}, the record says {self.shape}.")
        # Where each value goes in the volume as a model sees it, so that a row is one assignment.
        flat = np.arange(math.prod(self.shape)).reshape(self.shape[1:])
        self.places_V = flat.transpose(np.argsort(self.axes))[mask]

    def __call__(self, cell: bytes) -> PackedArray:
        """The volume of a cell.

        Raises:
            DataError: the cell does not hold as many values as the mask has places.
        """
        values_V = PackedArray(cell, "float32", self.places_V.shape).array()
        volume = np.zeros(math.prod(self.shape), np.float32)
        volume[self.places_V] = values_V
        return PackedArray(volume.tobytes(), "float32", self.shape)
