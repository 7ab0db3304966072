"""The contract of a raw data set: a downloaded folder, read row by row, nothing changed.

An adapter knows one published layout with its quirks. It yields every row that the layout names,
good or bad; what is bad about a row is found in `mm_moe.data.prepare.check` (or told by the adapter
as a `fault`), and `mm_moe.data.prepare.write` puts the good rows into Parquet and the bad ones into
quarantine.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from mm_moe.errors import DataError

IMAGES, TEXTS, SEQUENCES = "image", "text", "sequence"  # kinds of payload
ARRAYS = "array"  # numbers of one shape, uint8 or float32
EVENT_LISTS = "events"  # measurements at irregular times, see `mm_moe.data.events`
SPLITS = ("train", "validation", "test")  # our names; adapters map the published ones


@dataclass(frozen=True)
class Volume:
    """How a vector becomes a volume: its values go to the places of a mask, 0 elsewhere.

    Attributes:
        mask: bool (X, Y, Z), as many True as the vector is long.
        axes: order of the mask's axes in the volume that a model sees, behind its channel.
    """

    mask: Any
    axes: tuple[int, int, int]


@dataclass(frozen=True)
class RawRow:
    """One row as the download has it.

    Attributes:
        id: unique over all splits.
        payload: modality -> path of an image file, text, float array (T, D), or array of the
            modality's shape. What the row lacks by nature is absent.
        label: class index, zeros and ones, number, or None where the download has none.
        group: rows of one group lose the same modality under a missing mask; None: the row is
            alone.
        mask_key: what a missing mask is keyed by, where that is not the group (see `Sample`).
        fault: what is wrong with the row's entry in the index, if anything.
        repairs: what was mended in the row -> how many values.
    """

    id: str
    payload: dict[str, Path | str | Any] = field(default_factory=dict)
    label: Any = None
    group: str | None = None
    mask_key: str | None = None
    fault: str | None = None
    repairs: dict[str, int] = field(default_factory=dict)


class RawDataSet(ABC):
    """One published layout, built as `AdapterClass(source, **options)`.

    Attributes:
        name: key of masks and splits in everything that follows.
        kinds: modality -> kind of its payload, in the model's order.
        problem_type: see `mm_moe.data.schema`.
        task: the family of scores (see `mm_moe.data.schema.TASKS`).
        label_names: class names in the order of the labels.
        license: who may do what with the data.
        notes: quirks of the layout and how they are treated; written beside the data.
        scales: modality -> number by which a model divides the values of its arrays (default 1).
        unlabelled: split -> why it has no labels; such a split is kept, but cannot be scored.
        trims_padding: cut off the zero steps at either end of a sequence, and take a sequence of
            zeros alone for a missing one.
        statistics_over: splits whose rows give mean and spread of the sequences; none: the values
            are used as they are.
        needs_labels: a row without a label is bad, in splits that have labels.
        private: ids, groups and mask keys become pseudonyms, and no fault repeats a value.
        groups_apart: a group (a patient) in two splits is an error.
        forms: array modality -> what it is, see `DataSource.array_shapes`.
        volumes: array modality -> how its vectors are to be laid out.
        variables: modality of events -> the names of its variables.
        hours: width of the window of the events.

    Raises:
        DataError: the folder is not in this layout; names the first file that is missing.
    """

    name: ClassVar[str]
    kinds: dict[str, str]
    problem_type: str
    task: str
    label_names: tuple[str, ...]
    license: str
    notes: tuple[str, ...]
    trims_padding: bool = True
    statistics_over: tuple[str, ...] = ("train",)
    scales: Mapping[str, float] = MappingProxyType({})

    needs_labels: bool = True
    private: bool = False
    groups_apart: bool = False
    forms: Mapping[str, str] = MappingProxyType({})
    volumes: Mapping[str, Volume] = MappingProxyType({})
    variables: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    hours: float = 0.0

    def __init__(self, source: Path) -> None:
        self.source = source
        self.unlabelled: dict[str, str] = {}
        if not source.is_dir():
            raise DataError(f"--source {str(source)!r} is no folder; name that of the download.")

    @abstractmethod
    def splits(self) -> tuple[str, ...]:
        """The splits that the download has, of `SPLITS`."""

    @abstractmethod
    def rows(self, split: str) -> Iterator[RawRow]:
        """Every row of a split, in the published order."""

    @abstractmethod
    def indices(self) -> list[Path]:
        """The files that say what rows there are; their sha256 goes into the record."""

    @property
    def options(self) -> dict[str, Any]:
        """The adapter's own options, for the record."""
        return {}

    def key_files(self) -> list[Path]:
        """The files whose content makes the key of the pseudonyms; none of them is public."""
        return self.indices()

    def findings(self) -> dict[str, Any]:
        """What the rows showed, as counts and names of columns; asked for after all rows."""
        return {}

    def extras(self) -> dict[str, bytes]:
        """Name -> content of further files for the output; only their owner may read them."""
        return {}

    def need(self, *parts: str) -> Path:
        """The path of a file or folder below `source`.

        Raises:
            DataError: it is not there.
        """
        path = self.source.joinpath(*parts)
        if not path.exists():
            raise DataError(
                f"{str(self.source)!r} is not in the layout of {self.name!r}: there is no "
                f"{'/'.join(parts)}; see the docstring of {type(self).__module__}."
            )
        return path


def read_json(path: Path, *, kind: type) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: not JSON (line and column), or not of this kind.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from error
    except (OSError, ValueError, RecursionError) as error:  # the last: nested too deep
        raise DataError(f"{path} cannot be read: {type(error).__name__}.") from error
    if not isinstance(value, kind):
        raise DataError(f"{path} holds a {type(value).__name__}; it should be a {kind.__name__}.")
    return value


def first_text(value: Any) -> str | None:
    """The text in a cell that holds a text or a list of texts; None if there is none."""
    if isinstance(value, list):
        value = next((entry for entry in value if isinstance(entry, str) and entry.strip()), None)
    return value if isinstance(value, str) and value.strip() else None
