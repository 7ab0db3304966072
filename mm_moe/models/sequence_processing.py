"""From raw feature sequences and arrays to a tower's tensors: standardise, pad, mask, scale.

Axes: N rows, T steps, D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm_moe.backbones.base import ArrayNeeds, SequenceNeeds
from mm_moe.batch import PackedArray
from mm_moe.errors import DataError

FLOAT = np.dtype("<f4")


class SequenceProcessor:
    """List of sequences -> {"values": float32 (N, T, D), "mask": bool (N, T)}.

    A sequence is an array (T, D), or the bytes of one as prepared data hold it. Padding (on the
    right, to the longest row) is 0 after standardisation. Steps beyond the tower's length are cut.

    Args:
        needs: of the modality; mean and spread are the training split's.
    """

    def __init__(self, needs: SequenceNeeds) -> None:
        self.width, self.length = needs.width, needs.length
        mean_D = np.zeros(needs.width) if needs.mean is None else np.asarray(needs.mean)
        std_D = np.ones(needs.width) if needs.std is None else np.asarray(needs.std)
        if mean_D.shape != (needs.width,) or std_D.shape != (needs.width,) or (std_D <= 0).any():
            raise DataError(
                f"a sequence of width {needs.width} needs as many means and spreads above 0."
            )
        self.mean_D, self.scale_D = mean_D.astype(FLOAT), (1 / std_D).astype(FLOAT)

    def __call__(self, rows: list[Any]) -> dict[str, Tensor]:
        """Standardise and pad."""
        arrays = [self._array(row)[: self.length] for row in rows]
        longest = max(len(array_TD) for array_TD in arrays)
        values_NTD = np.zeros((len(arrays), longest, self.width), dtype=FLOAT)
        mask_NT = np.zeros((len(arrays), longest), dtype=bool)
        for n, array_TD in enumerate(arrays):
            values_NTD[n, : len(array_TD)] = (array_TD - self.mean_D) * self.scale_D
            mask_NT[n, : len(array_TD)] = True
        return {"values": torch.from_numpy(values_NTD), "mask": torch.from_numpy(mask_NT)}

    def _array(self, row: Any) -> np.ndarray:
        """One sequence as (T, D)."""
        if isinstance(row, bytes):
            if not row or len(row) % (FLOAT.itemsize * self.width):
                raise DataError(
                    f"a sequence of {len(row)} bytes is not made of float32 steps of width "
                    f"{self.width}; is it data of another model?"
                )
            return np.frombuffer(row, dtype=FLOAT).reshape(-1, self.width)
        array_TD = np.asarray(row, dtype=FLOAT)
        if array_TD.ndim != 2 or array_TD.shape[1] != self.width or not len(array_TD):
            raise DataError(
                f"a sequence has shape {array_TD.shape}; the model takes (T, {self.width})."
            )
        return array_TD


class ArrayProcessor:
    """List of arrays of one shape -> {"values": float32 (N, *shape)}, (value - mean) / scale."""

    def __init__(self, needs: ArrayNeeds) -> None:
        self.needs = needs

    def __call__(self, rows: list[Any]) -> dict[str, Tensor]:
        """Stack and scale."""
        arrays = [row.array() if isinstance(row, PackedArray) else np.asarray(row) for row in rows]
        for array in arrays:
            if array.shape != self.needs.shape:
                raise DataError(
                    f"an array has shape {array.shape}; the model takes {self.needs.shape}."
                )
        values = np.stack(arrays).astype(FLOAT)
        if self.needs.mean:
            values -= np.float32(self.needs.mean)
        values /= np.float32(self.needs.scale)
        return {"values": torch.from_numpy(values)}
