"""Shapes of arrays and feature sequences, and the sequences' mean and spread over training rows.

Axes: T steps of one sequence, D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mm_moe.data.events import EventStatistics, event_entry


class SequenceStatistics:
    """Running sums of one modality; every step of every counted sequence weighs the same."""

    def __init__(self, modality: str) -> None:
        self.modality = modality
        self.width: int | None = None
        self.length = 0
        self.steps = 0
        self._sum_D: np.ndarray = np.zeros(0)
        self._squares_D: np.ndarray = np.zeros(0)

    def see(self, array_TD: np.ndarray | None, *, count: bool) -> str | None:
        """Take note of a sequence; returns what is wrong with its width, if anything.

        Args:
            array_TD: the sequence, or None where the row lacks it.
            count: whether it enters mean and spread (only training rows do).
        """
        if array_TD is None:
            return None
        length, width = array_TD.shape
        if self.width is None:
            self.width = width
            self._sum_D, self._squares_D = np.zeros(width), np.zeros(width)
        if width != self.width:
            return f"{self.modality} is {width} wide, the rows before it {self.width}"
        self.length = max(self.length, length)
        if count:
            wide_TD = array_TD.astype(np.float64)
            self.steps += length
            self._sum_D += wide_TD.sum(0)
            self._squares_D += np.square(wide_TD).sum(0)
        return None

    def record(self) -> dict[str, Any]:
        """{"width", "length", "mean", "std"} (D,); a constant channel gets spread 1."""
        mean_D = self._sum_D / max(self.steps, 1)
        variance_D = np.maximum(self._squares_D / max(self.steps, 1) - np.square(mean_D), 0.0)
        std_D = np.sqrt(variance_D)
        flat_D = std_D <= 1e-6 * np.maximum(np.abs(mean_D), 1.0)
        return {
            "width": self.width or 0,
            "length": self.length,
            "dtype": "float32",
            "mean": np.round(mean_D, 7).tolist(),
            "std": np.where(flat_D, 1.0, np.round(std_D, 7)).tolist(),
        }


class ArrayShape:
    """The one shape and type of a modality's arrays."""

    def __init__(self, modality: str, *, scale: float) -> None:
        self.modality, self.scale = modality, scale
        self.shape: tuple[int, ...] | None = None
        self.dtype = ""

    def see(self, array: np.ndarray | None, *, count: bool) -> str | None:
        """Take note of an array; returns what is wrong with its shape or type, if anything."""
        if array is None:
            return None
        if self.shape is None:
            self.shape, self.dtype = array.shape, array.dtype.name
        if (array.shape, array.dtype.name) != (self.shape, self.dtype):
            return (
                f"{self.modality} is {array.dtype.name} {array.shape}, the rows before it "
                f"{self.dtype} {self.shape}"
            )
        return None

    def record(self) -> dict[str, Any]:
        """{"shape", "dtype", "scale"}."""
        return {"shape": list(self.shape or ()), "dtype": self.dtype, "scale": self.scale}


class EventShape:
    """Vocabulary and statistics of one modality of events."""

    def __init__(self, variables: tuple[str, ...], *, hours: float) -> None:
        self.variables, self.hours = variables, hours
        self.length = 0
        self.statistics = EventStatistics(len(variables))

    def see(self, array_T3: np.ndarray | None, *, count: bool) -> str | None:
        """Take note of a row's events, whose form was checked; nothing can be wrong here."""
        if array_T3 is not None:
            self.length = max(self.length, len(array_T3))
            if count:
                self.statistics.add(array_T3)
        return None

    def record(self) -> dict[str, Any]:
        """An entry of `DataSource.sequences`, with its kind: events are sequences of width 3."""
        entry = event_entry(
            self.variables,
            statistics=self.statistics.record(),
            length=self.length,
            hours=self.hours,
        )
        return {"kind": "sequence", "dtype": "float32", **entry}
