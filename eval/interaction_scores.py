"""Scores of fused probabilities, and how sure a difference between two of them is.

N samples, C classes, R resamples, B bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from eval.grid_table import draw_groups, interval_of

NUM_BINS = 15
FLOOR = 1e-12


def confusion(predicted_N: np.ndarray, labels_N: np.ndarray, *, num_classes: int) -> np.ndarray:
    """Counts (C, C): true class down, predicted class across."""
    cells_N = np.asarray(labels_N) * num_classes + np.asarray(predicted_N)
    return np.bincount(cells_N, minlength=num_classes**2).reshape(num_classes, num_classes)


def decision_scores(counts_CC: np.ndarray) -> dict[str, np.ndarray]:
    """Accuracy, precision, recall and F1 of a confusion matrix (..., C, C).

    With two classes `precision`, `recall` and `f1` are those of class 1 (scikit-learn's "binary").
    The `macro_` ones are means over all C classes; a class that is neither there nor predicted
    counts 0, as in scikit-learn with `labels` of all classes and `zero_division` 0.
    """
    counts_CC = np.asarray(counts_CC, np.float64)
    hit_C = np.diagonal(counts_CC, axis1=-2, axis2=-1)
    true_C, said_C = counts_CC.sum(-1), counts_CC.sum(-2)
    precision_C, recall_C = _share(hit_C, said_C), _share(hit_C, true_C)
    f1_C = _share(2 * hit_C, true_C + said_C)
    found = {"accuracy": _share(hit_C.sum(-1), true_C.sum(-1))}
    of_class = {"precision": precision_C, "recall": recall_C, "f1": f1_C}
    if counts_CC.shape[-1] == 2:
        found |= {name: values[..., 1] for name, values in of_class.items()}
    return found | {f"macro_{name}": values.mean(-1) for name, values in of_class.items()}


def headline_of(num_classes: int) -> str:
    """The metric that comparisons are made in: F1 of class 1 of two, else macro F1."""
    return "f1" if num_classes == 2 else "macro_f1"


def scores(probs_NC: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
    """`decision_scores` of the likeliest classes, and the calibration of their probabilities."""
    predicted_N = probs_NC.argmax(-1)
    counts = confusion(predicted_N, labels_N, num_classes=probs_NC.shape[-1])
    found = {name: float(value) for name, value in decision_scores(counts).items()}
    return found | {
        "ece": calibration_error(probs_NC, labels_N),
        "log_loss": log_loss(probs_NC, labels_N),
    }


def log_loss(probs_NC: np.ndarray, labels_N: np.ndarray) -> float:
    """Mean of -log p(label), p at least 1e-12."""
    said_N = probs_NC[np.arange(len(labels_N)), labels_N]
    return float(-np.log(np.maximum(said_N, FLOOR)).mean())


def calibration_error(
    probs_NC: np.ndarray, labels_N: np.ndarray, *, num_bins: int = NUM_BINS
) -> float:
    """Expected calibration error of the likeliest class.

    sum_b n_b / N * |accuracy_b - mean confidence_b| over bins ((b - 1) / B, b / B] of equal width
    (Guo et al. 2017).
    """
    sure_N = probs_NC.max(-1)
    hit_N = (probs_NC.argmax(-1) == labels_N).astype(float)
    bin_N = np.clip(np.ceil(sure_N * num_bins).astype(int) - 1, 0, num_bins - 1)
    gap_B = np.zeros(num_bins)
    np.add.at(gap_B, bin_N, hit_N - sure_N)
    return float(np.abs(gap_B).sum() / len(labels_N))


def by_category(
    probs_NC: np.ndarray, labels_N: np.ndarray, category_N: np.ndarray, *, names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Category -> {"n", accuracy, F1, ...} of its samples; a category without any is left out."""
    found = {}
    for index, name in enumerate(names):
        rows = category_N == index
        if rows.any():
            found[name] = {"n": int(rows.sum()), **scores(probs_NC[rows], labels_N[rows])}
    return found


def mcnemar(ours_N: np.ndarray, theirs_N: np.ndarray) -> dict[str, float]:
    """The exact two-sided test of McNemar on two models' hits (bool, N).

    Returns:
        {"only_ours", "only_theirs", "p"}: the samples that one alone has right, and the
        probability of a split at least as uneven if both were equally likely. Without any, p = 1.
    """
    ours_N, theirs_N = np.asarray(ours_N, bool), np.asarray(theirs_N, bool)
    only_ours, only_theirs = int((ours_N & ~theirs_N).sum()), int((theirs_N & ~ours_N).sum())
    count, fewer = only_ours + only_theirs, min(only_ours, only_theirs)
    ways = sum(math.comb(count, k) for k in range(fewer + 1))
    p = min(1.0, 2 * ways / 2**count)
    return {"only_ours": only_ours, "only_theirs": only_theirs, "p": p}


def resampled_scores(
    predicted: Mapping[str, np.ndarray],
    labels_N: np.ndarray,
    *,
    num_classes: int,
    metric: str,
    num_resamples: int,
    groups: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """One metric of several models on all rows and on the same R resamples of them: (1 + R,) each.

    Args:
        predicted: model -> predicted classes (N,).
        labels_N: true classes.
        num_classes: C.
        metric: a key of `decision_scores`.
        num_resamples: R.
        groups: (N,) rows of one group are drawn together.
        seed: of the draws.
    """
    groups = np.arange(len(labels_N)) if groups is None else groups
    draws = draw_groups(groups, num_resamples=num_resamples, seed=seed)
    rows = [np.arange(len(labels_N)), *draws]
    found = {}
    for name, said_N in predicted.items():
        counts = [confusion(said_N[r], labels_N[r], num_classes=num_classes) for r in rows]
        found[name] = decision_scores(np.array(counts))[metric]
    return found


def difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Difference of two models' `resampled_scores` with its 95% interval and two-sided p."""
    return interval_of(ours - theirs)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """The part of the whole; 0 where the whole is 0."""
    return np.divide(part, whole, out=np.zeros_like(part, dtype=float), where=whole > 0)
