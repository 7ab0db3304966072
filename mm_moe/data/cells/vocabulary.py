"""The words of a cell data set: genes of each species, labels of each column of conditions.

They are made from the training cells, saved with the model, and given back for other data: a label
that training never saw has the code 0.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mm_moe.errors import ConfigError, DataError

UNKNOWN = 0
logger = logging.getLogger("mm_moe.data")


@dataclass(frozen=True)
class Vocabulary:
    """Genes and labels, in the order of their numbers.

    Attributes:
        genes: species -> names of its genes; gene g is column g of a cell.
        conditions: column -> its labels; label n has the code n + 1, and 0 is for all others.
    """

    genes: Mapping[str, tuple[str, ...]]
    conditions: Mapping[str, tuple[str, ...]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "genes": {name: list(genes) for name, genes in self.genes.items()},
            "conditions": {name: list(labels) for name, labels in self.conditions.items()},
        }

    @classmethod
    def of(cls, given: Mapping[str, Any] | str) -> Vocabulary:
        """From what `to_dict` gave, or a JSON file of it.

        Raises:
            ConfigError: neither.
            DataError: the file cannot be read.
        """
        if isinstance(given, str):
            try:
                given = json.loads(Path(given).expanduser().read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise DataError(
                    f"no vocabulary can be read from {given} ({type(error).__name__}); give the "
                    "JSON file that was saved with the model."
                ) from error
        if not isinstance(given, Mapping) or not {"genes", "conditions"} <= set(given):
            raise ConfigError(
                'the option "vocabulary" must be a file or an object with "genes" (species -> '
                'names) and "conditions" (column -> labels).'
            )
        genes, conditions = given["genes"], given["conditions"]
        for name, words in (("genes", genes), ("conditions", conditions)):
            lists = words.values() if isinstance(words, Mapping) else [None]
            if not all(isinstance(own, list | tuple) for own in lists):
                raise ConfigError(f'"{name}" of the vocabulary must be an object of lists.')
        for name, own in genes.items():
            if len(set(own)) < len(own):
                raise ConfigError(f"the vocabulary has a gene of {name!r} twice.")
        return cls(
            {name: tuple(map(str, own)) for name, own in genes.items()},
            {name: tuple(map(str, own)) for name, own in conditions.items()},
        )


def labels_of(columns: Iterable[np.ndarray]) -> tuple[str, ...]:
    """The labels that stand in some columns, sorted, without the empty one."""
    found: set[str] = set()
    for column in columns:
        found.update(np.unique(column).tolist())
    return tuple(sorted(found - {""}))


def codes(column: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """Label -> its place + 1, and 0 for any other: int32 (N,)."""
    code = {label: n + 1 for n, label in enumerate(labels)}
    values, place_N = np.unique(column, return_inverse=True)
    return np.array([code.get(v, UNKNOWN) for v in values.tolist()], dtype=np.int32)[place_N]


def unseen(column: np.ndarray, labels: Sequence[str]) -> dict[str, int]:
    """Labels that are none of `labels`, with the number of their cells."""
    values, count = np.unique(column, return_counts=True)
    known = {*labels, ""}
    return {v: int(n) for v, n in zip(values.tolist(), count, strict=True) if v not in known}


def tell_unseen(found: Mapping[str, Mapping[str, int]], *, split: str) -> None:
    """Say once which labels have the code 0."""
    for column, labels in found.items():
        if labels:
            shown = ", ".join(f"{label} ({count:,})" for label, count in list(labels.items())[:3])
            logger.warning(
                "%d cells of split %r have a %s that training does not have (%s%s); taken as "
                "unknown",
                sum(labels.values()),
                split,
                column,
                shown,
                ", ..." if len(labels) > 3 else "",
            )
