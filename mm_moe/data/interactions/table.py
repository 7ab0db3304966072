"""The table of interaction categories: one Parquet file, a row for each sample of each split.

Columns: id, split, label, category (name, null where there is none), code (fine, -1 for none),
coarse (0 R, 1 U, 2 AS, 3 DS, -1), soft (Q weights, null where a modality is missing), and for each
modality `prediction_<name>` (-1 where missing) and `probability_<name>` (C numbers). Modalities and
classes stand in the file's metadata.

Axes: N rows, M modalities, C classes, Q fine categories.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mm_moe.batch import IGNORED_LABEL
from mm_moe.data.interactions.categories import (
    COARSE,
    NONE,
    categorise,
    category_names,
    coarse_codes,
    soft_categories,
)
from mm_moe.data.reading import reading
from mm_moe.errors import DataError

FORMAT = "mm_moe.interactions.v1"
KEY = b"mm_moe"
NAMED = 3  # ids that a message names


@dataclass(frozen=True)
class InteractionTable:
    """Categories of the samples of a data set.

    Attributes:
        dataset: its name.
        modalities: in the order of the categories' bits.
        label_names: the classes.
        ids: N sample ids, unique.
        splits: N names of splits.
        label_N: class indices.
        code_N: fine categories, `NONE` for none.
        soft_NQ: weights of the fine categories, NaN where there are none.
        predictions: modality -> (N,) class indices, `NONE` where missing.
        probabilities: modality -> (N, C), NaN where missing.
        origin: how it was made.
    """

    dataset: str
    modalities: tuple[str, ...]
    label_names: tuple[str, ...]
    ids: tuple[str, ...]
    splits: tuple[str, ...]
    label_N: np.ndarray
    code_N: np.ndarray
    soft_NQ: np.ndarray
    predictions: Mapping[str, np.ndarray]
    probabilities: Mapping[str, np.ndarray]
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(set(self.ids)) != len(self.ids):
            seen: set[str] = set()
            twice = next(i for i in self.ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
            raise DataError(f"an interaction table names the sample {twice!r} twice.")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the fine categories."""
        return category_names(self.modalities)

    @property
    def coarse_N(self) -> np.ndarray:
        """Places in `COARSE`, `NONE` for none."""
        return coarse_codes(self.code_N, num_modalities=len(self.modalities))

    def rows_of(self, split: str) -> np.ndarray:
        """Positions of a split's rows."""
        return np.flatnonzero(np.array(self.splits) == split)

    def training_codes(self, split: str, *, fine: bool = False) -> dict[str, int]:
        """Category by id of a split's rows, for a batch; `IGNORED_LABEL` where there is none."""
        code_N = self.code_N if fine else self.coarse_N
        return {
            self.ids[n]: IGNORED_LABEL if code_N[n] == NONE else int(code_N[n])
            for n in self.rows_of(split)
        }

    def save(self, path: str | Path) -> None:
        """Write the table."""
        names = self.names
        columns: dict[str, Any] = {
            "id": pa.array(self.ids, pa.string()),
            "split": pa.array(self.splits, pa.string()),
            "label": pa.array(self.label_N, pa.int64()),
            "category": pa.array([None if c == NONE else names[c] for c in self.code_N]),
            "code": pa.array(self.code_N, pa.int64()),
            "coarse": pa.array(self.coarse_N, pa.int64()),
            "soft": _lists(self.soft_NQ),
        }
        for name in self.modalities:
            columns[f"prediction_{name}"] = pa.array(self.predictions[name], pa.int64())
            columns[f"probability_{name}"] = _lists(self.probabilities[name])
        about = {
            "format": FORMAT,
            "dataset": self.dataset,
            "modalities": self.modalities,
            "label_names": self.label_names,
            "categories": names,
            "origin": dict(self.origin),
        }
        table = pa.table(columns).replace_schema_metadata({KEY: json.dumps(about).encode()})
        pq.write_table(table, path)

    @classmethod
    def load(cls, path: str | Path) -> InteractionTable:
        """Read a table that `save` wrote.

        Raises:
            DataError: not such a table, or its columns contradict each other.
        """
        if not Path(path).is_file():
            raise DataError(
                f"there is no interaction table {str(path)!r}; make one with `python "
                "launch/prepare_data.py interactions --dataset NAME --output DIR`."
            )
        with reading(f"the interaction table {path}"):
            table = pq.read_table(path)
        try:
            about = json.loads((table.schema.metadata or {})[KEY])
            if about["format"] != FORMAT:
                raise KeyError(about["format"])
            found = cls._of(about, table.to_pydict())
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is no interaction table ({FORMAT}): {error}.") from error
        found._check(str(path))
        return found

    @classmethod
    def _of(cls, about: dict[str, Any], rows: dict[str, list[Any]]) -> InteractionTable:
        modalities = tuple(about["modalities"])
        width = len(about["label_names"])
        return cls(
            dataset=about["dataset"],
            modalities=modalities,
            label_names=tuple(about["label_names"]),
            ids=tuple(rows["id"]),
            splits=tuple(rows["split"]),
            label_N=np.array(rows["label"], dtype=np.int64),
            code_N=np.array(rows["code"], dtype=np.int64),
            soft_NQ=_array(rows["soft"], len(category_names(modalities))),
            predictions={n: np.array(rows[f"prediction_{n}"], dtype=np.int64) for n in modalities},
            probabilities={n: _array(rows[f"probability_{n}"], width) for n in modalities},
            origin=about["origin"],
        )

    def _check(self, path: str) -> None:
        """Refuse a table whose categories are not those of its predictions."""
        parts = [self.predictions[name] for name in self.modalities]
        wrong_N = categorise(parts, labels=self.label_N) != self.code_N
        if wrong_N.any():
            n = int(wrong_N.argmax())
            raise DataError(
                f"{path}: the category of sample {self.ids[n]!r} does not follow from its label "
                f"and predictions ({int(wrong_N.sum())} such rows); make the table again."
            )


def table_of(
    *,
    dataset: str,
    label_names: Sequence[str],
    ids: Sequence[str],
    splits: Sequence[str],
    label_N: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    probabilities: Mapping[str, np.ndarray],
    origin: Mapping[str, Any],
) -> InteractionTable:
    """A table from labels and from what each modality says, in the order of `predictions`."""
    modalities = tuple(predictions)
    return InteractionTable(
        dataset=dataset,
        modalities=modalities,
        label_names=tuple(label_names),
        ids=tuple(ids),
        splits=tuple(splits),
        label_N=label_N,
        code_N=categorise([predictions[name] for name in modalities], labels=label_N),
        soft_NQ=soft_categories([probabilities[name] for name in modalities], labels=label_N),
        predictions=predictions,
        probabilities=probabilities,
        origin=origin,
    )


def check_covers(table: InteractionTable, ids: Sequence[str], *, split: str) -> None:
    """Refuse a split of which the table lacks a sample.

    Raises:
        DataError: names the first ones.
    """
    known = {table.ids[n] for n in table.rows_of(split)}
    lacking = [sample_id for sample_id in ids if sample_id not in known]
    if lacking:
        first = ", ".join(map(repr, lacking[:NAMED]))
        raise DataError(
            f"{len(lacking)} of {len(ids)} samples of split {split!r} are not in the interaction "
            f"table (it has {len(known)} of that split), first {first}; make the table from this "
            "data set and split."
        )


def coarse_name(code: int) -> str:
    """R, U, AS or DS; "none" for `NONE`."""
    return "none" if code == NONE else COARSE[code]


def _lists(value_NX: np.ndarray) -> pa.Array:
    """Rows as lists, null where they hold NaN."""
    gone_N = np.isnan(value_NX).any(-1)
    rows = [None if gone else row for gone, row in zip(gone_N, value_NX.tolist(), strict=True)]
    return pa.array(rows, pa.list_(pa.float64()))


def _array(rows: list[list[float] | None], width: int) -> np.ndarray:
    """The reverse of `_lists`."""
    empty = [np.nan] * width
    return np.array([empty if row is None else row for row in rows], dtype=float).reshape(-1, width)
