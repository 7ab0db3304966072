"""What a data set lacks, by nature and by a protocol, and whether that tells the label.

Everything is counted over whole splits; nothing of a row is kept, and counts of fewer rows than a
limit are not told.

N rows, M modalities. A pattern is a set of modalities as in `mm_moe.batch`: bit m.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats

from mm_moe.batch import pattern_index, pattern_name
from mm_moe.data.collate import Missing, presence
from mm_moe.data.reading import reading
from mm_moe.data.schema import NO_LABEL, REGRESSION, SINGLE_LABEL, SURVIVAL, DataSource

CHUNK = 256
RARER = "rarer patterns"


@dataclass(frozen=True)
class Presence:
    """What the rows of a split have.

    Attributes:
        natural_NM: bool, by nature.
        left_NM: bool, what the protocol leaves of it.
        labels: of the rows, as the data set gives them.
    """

    natural_NM: np.ndarray
    left_NM: np.ndarray
    labels: list[Any]

    @classmethod
    def of(cls, source: DataSource, split: str, missing: Missing | None) -> Presence:
        """One pass over a split; payloads are read and forgotten.

        Raises:
            DataError: as the data set's stream.
        """
        natural: list[np.ndarray] = []
        left: list[np.ndarray] = []
        labels: list[Any] = []
        for chunk in _chunks(source, split):
            for parts, protocol in ((natural, None), (left, missing)):
                found = presence(chunk, modalities=source.modalities, missing=protocol)
                parts.append(found.numpy())
            labels += [sample.label for sample in chunk]
        empty = np.zeros((0, len(source.modalities)), bool)
        return cls(np.concatenate([empty, *natural]), np.concatenate([empty, *left]), labels)


def report(source: DataSource, split: str, *, missing: Missing | None, least: int) -> dict:
    """The missingness of one split.

    Args:
        source: the data set.
        split: its split.
        missing: imposed missingness, told apart from the natural one; None for none.
        least: patterns of fewer rows are counted together, and a class of fewer rows has no rates.

    Returns:
        "rows"; "natural" and "imposed" (what the protocol takes of what nature left): modality ->
        {"rows", "rate"}; "patterns" and "patterns_left": name -> {"rows", "rate"}, the most
        frequent first; "together": modality -> modality -> phi of both lacking by nature; "label":
        modality -> see `association`.
    """
    found = Presence.of(source, split, missing)
    names, rows = source.modalities, len(found.labels)
    taken_NM = found.natural_NM & ~found.left_NM
    return {
        "rows": rows,
        "natural": _rates(~found.natural_NM, names),
        "imposed": _rates(taken_NM, names),
        "patterns": patterns(found.natural_NM, names, least=least),
        "patterns_left": patterns(found.left_NM, names, least=least),
        "together": {
            one: {
                other: _round(phi(~found.natural_NM[:, a], ~found.natural_NM[:, b]))
                for b, other in enumerate(names)
                if a != b
            }
            for a, one in enumerate(names)
        },
        "label": {
            name: association(
                ~found.natural_NM[:, m],
                found.labels,
                problem_type=source.problem_type,
                label_names=source.label_names,
                least=least,
            )
            for m, name in enumerate(names)
        },
    }


def patterns(
    present_NM: np.ndarray, modalities: tuple[str, ...], *, least: int
) -> dict[str, dict[str, float]]:
    """Name of a pattern -> its rows and rate; those of fewer than `least` rows come together."""
    index_N = pattern_index(torch.from_numpy(present_NM)).numpy()
    codes, counts = np.unique(index_N, return_counts=True)
    found: dict[str, int] = {}
    for code, count in sorted(zip(codes.tolist(), counts.tolist(), strict=True), key=_most_first):
        name = pattern_name(code, modalities) if count >= least else RARER
        found[name] = found.get(name, 0) + count
    return {name: _share(count, len(index_N)) for name, count in found.items()}


def association(
    absent_N: np.ndarray,
    labels: list[Any],
    *,
    problem_type: str,
    label_names: tuple[str, ...],
    least: int,
) -> dict[str, Any]:
    """Whether the absence of a modality goes with the label.

    Returns:
        "statistic": "phi" (two classes), "cramers_v" (more), "point_biserial" (a number) or
        "phi_by_class" (several classes a row); "value" in [-1, 1], or by class; "p": of the
        chi-squared test without correction, or of the correlation; "rate_by_class": share that lack
        the modality, None for a class of fewer than `least` rows. Value and p are None where one
        side does not vary. {} for data without labels, and where fewer than `least` rows lack the
        modality, or have it: one row's label could be read from the numbers.
    """
    known = [row for row, label in enumerate(labels) if label is not None]
    if problem_type == NO_LABEL or not known:
        return {}
    absent_N, kept = absent_N[known], [labels[row] for row in known]
    if 0 < min(absent_N.sum(), (~absent_N).sum()) < least:
        return {}
    if problem_type == REGRESSION:
        values_N = np.asarray(kept, dtype=np.float64)
        varies = absent_N.any() and not absent_N.all() and np.ptp(values_N) > 0
        r, p = stats.pointbiserialr(absent_N, values_N) if varies else (np.nan, np.nan)
        return {"statistic": "point_biserial", "value": _round(r), "p": _round(p)}
    if problem_type == SURVIVAL:  # of the event, whatever its time
        kept, label_names = [int(label[1]) for label in kept], ("censored", "event")
    if problem_type in (SINGLE_LABEL, SURVIVAL):
        return _single(absent_N, np.asarray(kept), label_names, least=least)
    hot_NC = np.asarray([_dense(label, len(label_names)) for label in kept], dtype=bool)
    by_class = {name: hot_NC[:, c] for c, name in enumerate(label_names)}
    return {
        "statistic": "phi_by_class",
        "value": {name: _round(phi(absent_N, hot_N)) for name, hot_N in by_class.items()},
        "p": {name: _round(chi2_p(absent_N, hot_N)) for name, hot_N in by_class.items()},
    }


def _single(
    absent_N: np.ndarray, label_N: np.ndarray, label_names: tuple[str, ...], *, least: int
) -> dict[str, Any]:
    """The association with one class of several."""
    binary = len(label_names) == 2
    value = phi(absent_N, label_N == 1) if binary else cramers_v(absent_N, label_N)
    rates = {}
    for c, name in enumerate(label_names):
        of_class_N = absent_N[label_N == c]
        rates[name] = _round(of_class_N.mean()) if len(of_class_N) >= max(least, 1) else None
    return {
        "statistic": "phi" if binary else "cramers_v",
        "value": _round(value),
        "p": _round(chi2_p(absent_N, label_N)),
        "rate_by_class": rates,
    }


def table_of(one_N: np.ndarray, other_N: np.ndarray) -> np.ndarray:
    """Counts of pairs of values, (2 or more, 2 or more) where both vary."""
    rows, columns = (np.unique(values, return_inverse=True)[1] for values in (one_N, other_N))
    counts = np.zeros((rows.max(initial=0) + 1, columns.max(initial=0) + 1))
    np.add.at(counts, (rows, columns), 1)
    return counts


def phi(one_N: np.ndarray, other_N: np.ndarray) -> float:
    """The correlation of two yes-or-no values; NaN where one does not vary."""
    if min(table_of(one_N, other_N).shape) < 2:
        return float("nan")
    return float(np.corrcoef(one_N.astype(float), other_N.astype(float))[0, 1])


def cramers_v(one_N: np.ndarray, other_N: np.ndarray) -> float:
    """The association of two classes in [0, 1] (Cramér, 1946); NaN where one does not vary."""
    counts = table_of(one_N, other_N)
    if min(counts.shape) < 2:
        return float("nan")
    chi2 = stats.chi2_contingency(counts, correction=False).statistic
    return float(np.sqrt(chi2 / (counts.sum() * (min(counts.shape) - 1))))


def chi2_p(one_N: np.ndarray, other_N: np.ndarray) -> float:
    """P of the chi-squared test of independence; NaN where one does not vary."""
    counts = table_of(one_N, other_N)
    if min(counts.shape) < 2:
        return float("nan")
    return float(stats.chi2_contingency(counts, correction=False).pvalue)


def _chunks(source: DataSource, split: str) -> Iterator[list[Any]]:
    with reading(f"split {split!r} of {source.name!r}"):
        samples = map(source.to_sample, source.stream(split))
        while chunk := list(itertools.islice(samples, CHUNK)):
            yield chunk


def _rates(absent_NM: np.ndarray, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    counts = absent_NM.sum(0).tolist()
    return {n: _share(count, len(absent_NM)) for n, count in zip(names, counts, strict=True)}


def _share(count: int, total: int) -> dict[str, float]:
    return {"rows": count, "rate": round(count / max(total, 1), 6)}


def _dense(label: Any, num_labels: int) -> list[bool]:
    """A row's classes; of soft targets those with at least half of the share."""
    if isinstance(label, Mapping):
        return [label.get(c, 0) >= 0.5 for c in range(num_labels)]
    return [bool(value) for value in label]


def _most_first(pair: tuple[int, int]) -> tuple[int, int]:
    return -pair[1], pair[0]


def _round(value: float) -> float | None:
    """Six digits, None for NaN."""
    return None if value != value else float(f"{value:.6g}")
