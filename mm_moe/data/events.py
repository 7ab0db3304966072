"""Measurements at irregular times: one array of [hours, variable, value] for each row.

The payload of such a modality is a feature sequence of width 3 (float32 (T, 3), or its bytes),
sorted by time, so everything that knows sequences knows it too: hours since the start of the row's
window (0 or more), the variable's place in the vocabulary (a whole number, exact in float32 below
2**24), and the value in its own unit, not standardised. Several events may have one time.

The vocabulary belongs to the data set: `DataSource.sequences[modality]["events"]` holds
{"variables": names, "mean": (V,), "std": (V,), "hours": width of the window}. Mean and spread are
those of each variable over the training rows (spread 1 for a constant one). The entry's own "mean"
and "std" are zeros and ones: hours and places are not to be standardised.

Legend: T events of one row, V variables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mm_moe.errors import DataError

HOURS, VARIABLE, VALUE = 0, 1, 2  # columns of an event
EVENT_WIDTH = 3
EVENTS = "events"  # key of the vocabulary in an entry of `DataSource.sequences`
MISSING_DOSAGE = 3  # of a uint8 vector of allele counts 0, 1, 2: not called
FLOAT = np.dtype("<f4")


def pack_events(
    hours_T: Sequence[float] | np.ndarray,
    variables_T: Sequence[int] | np.ndarray,
    values_T: Sequence[float] | np.ndarray,
) -> np.ndarray:
    """One row's events as float32 (T, 3), sorted by time, then variable, then value.

    The order does not depend on that of the input, whose ties files leave to chance.
    """
    columns = [np.asarray(column, np.float64) for column in (hours_T, variables_T, values_T)]
    order = np.lexsort((columns[VALUE], columns[VARIABLE], columns[HOURS]))
    return np.stack(columns, axis=1)[order].astype(FLOAT)


def read_events(payload: bytes | np.ndarray) -> np.ndarray:
    """A payload as float32 (T, 3).

    Raises:
        DataError: it is no array of events.
    """
    if isinstance(payload, bytes):
        if len(payload) % (EVENT_WIDTH * FLOAT.itemsize):
            raise DataError(
                f"{len(payload)} bytes are no events of {EVENT_WIDTH} float32 numbers; prepare "
                "the data again."
            )
        return np.frombuffer(payload, dtype=FLOAT).reshape(-1, EVENT_WIDTH)
    events_T3 = np.asarray(payload, dtype=FLOAT)
    if events_T3.ndim != 2 or events_T3.shape[1] != EVENT_WIDTH:
        raise DataError(f"events have shape {events_T3.shape}; they must be (T, {EVENT_WIDTH}).")
    return events_T3


def check_events(events_T3: np.ndarray, *, num_variables: int) -> str | None:
    """What is wrong with a row's events, if anything; never says a value."""
    if events_T3.ndim != 2 or events_T3.shape[1] != EVENT_WIDTH:
        return f"events have shape {events_T3.shape}, not (T, {EVENT_WIDTH})"
    if not len(events_T3):
        return "a series without an event"
    if not np.isfinite(events_T3).all():
        return "NaN or infinite event"
    places_T = events_T3[:, VARIABLE]
    if ((places_T != np.round(places_T)) | (places_T < 0) | (places_T >= num_variables)).any():
        return f"an event of a variable outside the {num_variables} known"
    if (events_T3[:, HOURS] < 0).any():
        return "an event before the start of the window"
    if (np.diff(events_T3[:, HOURS]) < 0).any():
        return "events out of order"
    return None


class EventStatistics:
    """Mean and spread of each variable, as running sums over training rows.

    Attributes:
        rows_V: in how many rows each variable was seen.
        length: most events of a row.
    """

    def __init__(self, num_variables: int) -> None:
        self.rows_V = np.zeros(num_variables, np.int64)
        self.length = 0
        self._count_V = np.zeros(num_variables, np.int64)
        self._mean_V = np.zeros(num_variables)
        self._squares_V = np.zeros(num_variables)  # sum of squared distances from the mean

    def add(self, events_T3: np.ndarray) -> None:
        """Take in one row, merged by the pairwise rule of Chan et al. (1983): exact for large N."""
        self.length = max(self.length, len(events_T3))
        places_T = events_T3[:, VARIABLE].astype(np.int64)
        values_T = events_T3[:, VALUE].astype(np.float64)
        count_V = np.bincount(places_T, minlength=len(self.rows_V))
        some_V = np.maximum(count_V, 1)
        mean_V = np.bincount(places_T, values_T, minlength=len(self.rows_V)) / some_V
        distance_T = np.square(values_T - mean_V[places_T])
        squares_V = np.bincount(places_T, distance_T, minlength=len(self.rows_V))
        total_V = np.maximum(self._count_V + count_V, 1)
        apart_V = mean_V - self._mean_V
        self._squares_V += squares_V + apart_V**2 * self._count_V * count_V / total_V
        self._mean_V += apart_V * count_V / total_V
        self._count_V += count_V
        self.rows_V += count_V > 0

    def record(self) -> dict[str, list[float]]:
        """{"mean", "std"} (V,) for the vocabulary; a constant or unseen variable has spread 1."""
        std_V = np.sqrt(self._squares_V / np.maximum(self._count_V, 1))
        flat_V = std_V <= 1e-6 * np.maximum(np.abs(self._mean_V), 1.0)
        return {
            "mean": np.round(self._mean_V, 7).tolist(),
            "std": np.where(flat_V, 1.0, std_V).tolist(),
        }


def event_entry(
    variables: Sequence[str], *, statistics: Mapping[str, Any], length: int, hours: float
) -> dict[str, Any]:
    """The entry of `DataSource.sequences` for a modality of events.

    Args:
        variables: names by place.
        statistics: {"mean", "std"} as `EventStatistics.record` gives them.
        length: most events that a row has.
        hours: width of the window.
    """
    own = {"variables": list(variables), **statistics, "hours": hours}
    return {
        "width": EVENT_WIDTH,
        "length": length,
        "mean": [0.0] * EVENT_WIDTH,
        "std": [1.0] * EVENT_WIDTH,
        EVENTS: own,
    }
