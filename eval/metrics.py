"""Scores of a task, the chance levels to read them against, and bootstrap intervals.

The numbers come from scikit-learn; this file says which ones belong to which kind of task and what
happens at the edges. N samples, C classes (or labels).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from sklearn import metrics as sk

from mm_moe.batch import IGNORED_LABEL
from mm_moe.data.schema import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from mm_moe.errors import ConfigError, DataError
from mm_moe.registry import nearest

LOWER_IS_BETTER = frozenset({"mae"})
IN_UNITS_OF_THE_LABEL = frozenset({"mae", "corr"})  # the others are shares, printed as percentages


def _macro_f1(labels_N: np.ndarray, predicted_N: np.ndarray) -> float:
    """Mean F1 over the classes that occur in `labels_N`: the same classes for every model."""
    classes = np.unique(labels_N)
    return sk.f1_score(labels_N, predicted_N, labels=classes, average="macro", zero_division=0)


def _balanced_accuracy(labels_N: np.ndarray, predicted_N: np.ndarray) -> float:
    """Mean recall over the classes that occur in `labels_N`."""
    classes = np.unique(labels_N)
    return sk.recall_score(labels_N, predicted_N, labels=classes, average="macro", zero_division=0)


def _f1(average: str) -> Callable[[np.ndarray, np.ndarray], float]:
    return lambda labels_NC, predicted_NC: sk.f1_score(
        labels_NC, predicted_NC, average=average, zero_division=0
    )


def _corr(labels_N: np.ndarray, predicted_N: np.ndarray) -> float:
    """Pearson's correlation; 0 where it is undefined because one side is constant."""
    if np.ptp(labels_N) == 0 or np.ptp(predicted_N) == 0:
        return 0.0
    return float(np.corrcoef(labels_N, predicted_N)[0, 1])


# Problem type -> metric name -> function(labels, predicted); the first one is the headline.
METRICS: dict[str, dict[str, Callable[[np.ndarray, np.ndarray], float]]] = {
    SINGLE_LABEL: {
        "accuracy": sk.accuracy_score,
        "balanced_accuracy": _balanced_accuracy,
        "macro_f1": _macro_f1,
    },
    MULTI_LABEL: {f"{name}_f1": _f1(name) for name in ("macro", "micro", "samples", "weighted")},
    REGRESSION: {"mae": sk.mean_absolute_error, "corr": _corr},
}


def headline(problem_type: str) -> str:
    """Name of the metric that stands for a task.

    Raises:
        ConfigError: the problem type has no scores.
    """
    return next(iter(_metrics_of(problem_type)))


def has_label(labels: np.ndarray) -> np.ndarray:
    """Rows that take part in the scores: bool (N,), False where `IGNORED_LABEL` stands."""
    ignored = np.asarray(labels) == IGNORED_LABEL
    return ~(ignored.any(-1) if ignored.ndim > 1 else ignored)


def scores(
    logits: np.ndarray, labels: np.ndarray, *, problem_type: str, num_labels: int
) -> dict[str, float]:
    """All scores of one set of predictions.

    Args:
        logits: (N, C); regression (N,) or (N, 1). Multi-label predicts a label where its logit is
            above 0 (probability above one half).
        labels: class indices (N,), zeros and ones (N, C), or values (N,). Rows that hold
            `IGNORED_LABEL` are left out.
        problem_type: a key of `METRICS`.
        num_labels: C.

    Returns:
        Metric name -> value. Single-label `balanced_accuracy` and `macro_f1` average over the
        classes that occur among the labels. Multi-label F1 counts a label that is neither present
        nor predicted as 0, as scikit-learn does (older torchmetrics dropped it from the mean).

    Raises:
        ConfigError: a problem type without scores.
        DataError: no labelled row, shapes that do not fit, or predictions that are not finite.
    """
    labels, predicted = _labelled(logits, labels, problem_type=problem_type, num_labels=num_labels)
    return {name: float(of(labels, predicted)) for name, of in _metrics_of(problem_type).items()}


def interval(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    metric: str,
    problem_type: str,
    num_labels: int,
    num_resamples: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of one metric over the samples.

    The interval holds for new samples of the same distribution and this one trained model; it says
    nothing about another training seed.
    """
    labels, predicted = _labelled(logits, labels, problem_type=problem_type, num_labels=num_labels)
    of = _metrics_of(problem_type)[metric]
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(num_resamples):
        rows = generator.integers(0, len(labels), len(labels))
        values.append(of(labels[rows], predicted[rows]))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _metrics_of(problem_type: str) -> dict[str, Callable[[np.ndarray, np.ndarray], float]]:
    if problem_type not in METRICS:
        raise ConfigError(
            f"problem type {problem_type!r} has no scores; {nearest(problem_type, list(METRICS))}"
        )
    return METRICS[problem_type]


def _labelled(
    logits: np.ndarray, labels: np.ndarray, *, problem_type: str, num_labels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions of the rows that have a label, after checking them."""
    _metrics_of(problem_type)
    logits, labels = np.asarray(logits), np.asarray(labels)
    rows = has_label(labels)
    if not rows.any():
        raise DataError(
            f"none of the {len(labels)} rows has a label, so there is nothing to score."
        )
    width = 1 if problem_type == REGRESSION else num_labels
    if logits.reshape(len(labels), -1).shape[1] != width:
        raise DataError(
            f"predictions of shape {logits.shape} do not fit {width} outputs of {len(labels)} rows."
        )
    logits, labels = logits[rows], labels[rows]
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits.reshape(len(labels), -1))).any(-1).sum())
        raise DataError(f"the predictions of {bad} of {len(labels)} rows are not finite.")
    if problem_type == SINGLE_LABEL:
        return labels.astype(int), logits.argmax(-1)
    if problem_type == MULTI_LABEL:
        return labels.astype(int), (logits > 0).astype(int)
    return labels.reshape(-1), logits.reshape(-1)
