"""MIMIC-III as the pickle `im.pk` of MultiBench: five static values and 24 hours of measurements.

Layout: one pickled dict with `ep_tdata` float (N, 24, 12), `adm_features_all` float (N, 5),
`adm_labels_all` (N, >= 6) and `y_icd9` (N, 20), zeros and ones. N stays, the same order in all.

Tasks: "mortality" (how long after admission death came: the first of the columns 1 to 5 of
`adm_labels_all` that is set; none of them is class 0), "icd9_1" (codes 140-239, neoplasms) and
"icd9_7" (codes 460-519, respiratory), which are columns of `y_icd9`.

The published split shuffles all rows with Python's generator at seed 10; the first tenth is the
validation, the second the test split. The file does not say which stays are of one patient, so that
no split can keep them together.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mm_moe.data.prepare.pickles import read_arrays
from mm_moe.data.prepare.raw import SEQUENCES, SPLITS, RawDataSet, RawRow
from mm_moe.data.schema import BINARY_AUPRC, SINGLE_LABEL
from mm_moe.errors import ConfigError, DataError
from mm_moe.registry import nearest

FILE = "im.pk"
MORTALITY = "mortality"
ICD9 = {"icd9_1": 1, "icd9_7": 7}  # task -> column of y_icd9
LABELS = {
    MORTALITY: ("longer_or_alive", "one_day", "two_days", "three_days", "one_week", "one_year"),
    "icd9_1": ("no_neoplasm", "neoplasm"),
    "icd9_7": ("not_respiratory", "respiratory"),
}
SHAPES = {  # key -> the shape of one row, where it is fixed
    "ep_tdata": (24, 12),
    "adm_features_all": (5,),
    "adm_labels_all": None,
    "y_icd9": (20,),
}
SEED = 10  # of the published split


class MimicImpkRaw(RawDataSet):
    """`im.pk`, one task of it.

    Args:
        source: the folder with `im.pk`, or the file itself.
        task: mortality, icd9_1 or icd9_7.
        statistics: rows whose mean and spread standardise the inputs: "train", or "all" as the
            published loader takes them, which lets the test rows into the training.

    Raises:
        ConfigError: an unknown option.
        DataError: no such file, or its content is not in the layout.
    """

    name = "mimic_impk"
    problem_type = SINGLE_LABEL
    license = (
        "MIMIC-III Clinical Database (PhysioNet credentialed licence), as im.pk from the authors "
        "of MultiBench; not to be shared"
    )
    notes = (
        "NaN and infinite values become 0, as in the published loader; the values are counted.",
        "Stays of one patient may lie in several splits: the file does not name patients.",
        "The score of the ICD-9 tasks is the average precision of the code; papers print accuracy.",
    )
    trims_padding = False  # an hour of zeros is a measurement that was mended

    def __init__(
        self, source: Path, *, task: str = MORTALITY, statistics: str = "train", file: str = FILE
    ) -> None:
        if source.is_file():
            source, file = source.parent, source.name
        super().__init__(source)
        if task not in LABELS:
            raise ConfigError(f"mimic_impk: unknown task {task!r}; {nearest(task, list(LABELS))}")
        if statistics not in ("train", "all"):
            raise ConfigError(f"mimic_impk: statistics is {statistics!r}; take train or all.")
        self.kinds = {"static": SEQUENCES, "series": SEQUENCES}
        self.what, self.statistics = task, statistics
        self.statistics_over = SPLITS if statistics == "all" else SPLITS[:1]
        self.task = SINGLE_LABEL if task == MORTALITY else BINARY_AUPRC
        self.label_names = LABELS[task]
        self.path = self.need(file)
        self.content = _read(self.path)

    def splits(self) -> tuple[str, ...]:
        """Train, validation and test: 80, 10 and 10 per cent."""
        return SPLITS

    def indices(self) -> list[Path]:
        """The pickle."""
        return [self.path]

    @property
    def options(self) -> dict[str, Any]:
        """Task and statistics."""
        return {"task": self.what, "statistics": self.statistics, "split": "published"}

    def rows(self, split: str) -> Iterator[RawRow]:
        """One row for each stay, in the order of the shuffle; its id is the number in the file."""
        content = self.content
        for n in published_split(len(content["ep_tdata"]))[split]:
            repairs: dict[str, int] = {}
            payload: dict[str, Any] = {
                "static": _finite(content["adm_features_all"][n], "static", repairs)[None],
                "series": _finite(content["ep_tdata"][n], "series", repairs),
            }
            name = f"stay-{n}"
            cells = self._label_cells(n)
            if not np.isfinite(cells).all():  # no comparison with NaN is true: it would be class 0
                yield RawRow(name, fault="NaN or infinite label")
            elif not np.isin(cells, (0, 1)).all():
                yield RawRow(name, fault="wrong label: neither 0 nor 1")
            else:
                yield RawRow(name, payload, self._label(n), repairs=repairs)

    def _label_cells(self, n: int) -> np.ndarray:
        """The numbers that the label of a stay is read from; no others need to be finite."""
        if self.what == MORTALITY:
            return self.content["adm_labels_all"][n, 1:6]
        return self.content["y_icd9"][n, [ICD9[self.what]]]

    def _label(self, n: int) -> int:
        if self.what == MORTALITY:
            return mortality_class(self.content["adm_labels_all"][n])
        return int(self._label_cells(n)[0] > 0)


def published_split(count: int) -> dict[str, list[int]]:
    """Split -> row numbers, as the published loader deals them."""
    rows = list(range(count))
    random.Random(SEED).shuffle(rows)  # the same order as after `random.seed(10)`
    tenth, fifth = count // 10, count // 5
    return {"train": rows[fifth:], "validation": rows[:tenth], "test": rows[tenth:fifth]}


def mortality_class(labels: np.ndarray) -> int:
    """The first of the columns 1 to 5 that is set, else 0."""
    return next((j for j in range(1, 6) if labels[j] > 0), 0)


def _finite(values: np.ndarray, modality: str, repairs: dict[str, int]) -> np.ndarray:
    """The values with 0 for those that are not finite, which are counted."""
    bad = ~np.isfinite(values)
    if bad.any():
        repairs[f"{modality} NaN or infinite to 0"] = int(bad.sum())
    return np.where(bad, 0.0, values)


def _read(path: Path) -> dict[str, np.ndarray]:
    """The four arrays, checked against each other."""
    content = read_arrays(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}; it should be a dict of arrays.")
    arrays: dict[str, np.ndarray] = {}
    for key, shape in SHAPES.items():
        array = content.get(key)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
            raise DataError(f"{path}: {key} is not there, or no array of numbers.")
        fits = array.shape[1:] == shape if shape else array.ndim == 2 and array.shape[1] >= 6
        if not fits:
            wanted = ", ".join(map(str, shape or ("6 or more",)))
            raise DataError(f"{path}: {key} has shape {array.shape}; it should be (N, {wanted}).")
        arrays[key] = array
    counts = {key: len(array) for key, array in arrays.items()}
    if len(set(counts.values())) != 1:
        raise DataError(f"{path}: its arrays differ in their number of rows: {counts}.")
    return arrays
