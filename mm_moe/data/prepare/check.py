"""What makes a raw row good: its payloads are there and readable, and it has a label.

A bad row is told by its id and the reason, never by its content. Axes: T steps, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mm_moe.data.decode import UndecodableImageError, decode_image
from mm_moe.data.events import check_events
from mm_moe.data.prepare.raw import ARRAYS, EVENT_LISTS, IMAGES, SEQUENCES, RawRow
from mm_moe.data.schema import check_label
from mm_moe.errors import DataError

FLOAT = np.dtype("<f4")  # how sequences are stored: float32, little-endian, row by row
LARGEST = float(np.finfo(np.float32).max)


class BadRowError(Exception):
    """Why a row goes into quarantine."""


@dataclass(frozen=True)
class Rules:
    """What every row of a split is checked against; small, since it goes to worker processes.

    Attributes:
        kinds: modality -> kind of payload.
        problem_type: see `mm_moe.data.schema`.
        num_labels: number of classes.
        needs_label: False in a split that is known to have none.
        trims_padding: see `RawDataSet`.
        variables: modality of events -> how many variables it has.
        gaps: modalities whose arrays may hold NaN for a cell that is not known: tables.
    """

    kinds: Mapping[str, str]
    problem_type: str
    num_labels: int
    needs_label: bool
    trims_padding: bool = True
    variables: Mapping[str, int] = field(default_factory=dict)
    gaps: frozenset[str] = frozenset()


@dataclass(frozen=True)
class CheckedRow:
    """A row after its check.

    Attributes:
        id: as in the raw row.
        payload: modality -> encoded image, text, or array; empty for a bad row.
        label: as in the raw row.
        group: as in the raw row.
        mask_key: as in the raw row.
        fault: why the row is bad, or None.
        sha256: of the payload and the label.
        repairs: as in the raw row.
    """

    id: str
    payload: dict[str, Any] = field(default_factory=dict)
    label: Any = None
    group: str | None = None
    mask_key: str | None = None
    fault: str | None = None
    sha256: str = ""
    repairs: dict[str, int] = field(default_factory=dict)


def check_row(row: RawRow, *, rules: Rules) -> CheckedRow:
    """Read and check one row; a bad one comes back with its `fault` and without payload."""
    try:
        if row.fault:
            raise BadRowError(row.fault)
        _check_label(row, rules)
        payload = {
            name: value
            for name, kind in rules.kinds.items()
            if (value := _read(row.payload.get(name), kind, name, rules)) is not None
        }
        if not payload:
            raise BadRowError("nothing in it: every modality is missing")
    except BadRowError as bad:
        return CheckedRow(row.id, fault=str(bad))
    digest = hashlib.sha256(repr(row.label).encode())
    for name, value in payload.items():
        raw = value.encode() if isinstance(value, str) else bytes(value)
        digest.update(f"{name} {len(raw)}\n".encode() + raw)
    return CheckedRow(
        row.id,
        payload,
        row.label,
        group=row.group,
        mask_key=row.mask_key,
        sha256=digest.hexdigest(),
        repairs=row.repairs,
    )


def _check_label(row: RawRow, rules: Rules) -> None:
    if row.label is None:
        if rules.needs_label:
            raise BadRowError("no label")
        return
    try:
        check_label(
            row.label,
            problem_type=rules.problem_type,
            num_labels=rules.num_labels,
            sample_id=row.id,
        )
    except DataError as error:
        raise BadRowError(f"wrong label: {error}") from error


def _read(value: Any, kind: str, modality: str, rules: Rules) -> Any:
    """One payload, read and checked; None where the row lacks the modality."""
    if value is None:
        return None
    if kind == IMAGES:
        return _image(value)
    if kind == SEQUENCES:
        return _sequence(value, modality, trims=rules.trims_padding)
    if kind == ARRAYS:
        return _array(value, modality, gaps=modality in rules.gaps)
    if kind == EVENT_LISTS:
        return _events(value, modality, num_variables=rules.variables[modality])
    return str(value) if str(value).strip() else None


def _image(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise BadRowError(f"image file is missing: {path.name}") from None
    except (OSError, ValueError) as error:  # the latter: a name with a zero byte
        raise BadRowError(f"image file cannot be read: {type(error).__name__}") from error
    try:
        decode_image(content)
    except UndecodableImageError as error:
        raise BadRowError(f"image does not decode ({error})") from error
    return content


def _array(value: Any, modality: str, *, gaps: bool) -> np.ndarray | None:
    """A finite array of uint8, or of float32 whatever it was.

    With `gaps` it may hold NaN, and is None if it holds nothing else.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "fiu" or not array.size:
        raise BadRowError(f"{modality} has shape {array.shape} of {array.dtype}, not numbers")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    known = array[~np.isnan(array)] if gaps else array
    if not (np.abs(known) <= LARGEST).all():
        raise BadRowError(f"NaN, infinite or too large values in {modality}")
    return np.ascontiguousarray(array, dtype=FLOAT) if known.size else None


def _events(value: Any, modality: str, *, num_variables: int) -> np.ndarray:
    array_T3 = np.ascontiguousarray(value, dtype=FLOAT)
    fault = check_events(array_T3, num_variables=num_variables)
    if fault:
        raise BadRowError(f"{fault} in {modality}")
    return array_T3


def _sequence(value: Any, modality: str, *, trims: bool) -> np.ndarray | None:
    """A finite float32 array (T, D).

    With `trims` it comes without the padding at its ends, and is None if all of it is zero.
    """
    array_TD = np.asarray(value)
    if array_TD.ndim != 2 or array_TD.dtype.kind not in "fiu":
        raise BadRowError(
            f"{modality} has shape {array_TD.shape} of {array_TD.dtype}, not numbers (T, D)"
        )
    if np.isnan(array_TD).any():
        raise BadRowError(f"NaN in {modality}")
    if not (np.abs(array_TD) <= LARGEST).all():
        raise BadRowError(f"infinite or too large values in {modality}")
    if not trims:
        return np.ascontiguousarray(array_TD, dtype=FLOAT)
    used = np.flatnonzero(array_TD.any(axis=1))
    if not len(used):
        return None
    return np.ascontiguousarray(array_TD[used[0] : used[-1] + 1], dtype=FLOAT)
