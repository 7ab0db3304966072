"""What a model that ignores its input would score: the floor under every table.

Two such models: "majority" says what the training labels make most likely, "uniform" throws a fair
die. N samples, C classes (or labels).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from eval.clinical import uniform_clinical
from eval.metrics import LOWER_IS_BETTER, has_label, scores
from mm_moe.data.schema import (
    BINARY,
    BINARY_AUPRC,
    CLINICAL_BINARY,
    CLINICAL_CLASSES,
    KNEE,
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    SURVIVAL,
    VQA,
)

CLINICAL = (CLINICAL_BINARY, CLINICAL_CLASSES)
TINY = 1e-12  # for the logarithm of the share of a class that training never saw


def chance(
    labels: np.ndarray,
    *,
    prior: np.ndarray,
    problem_type: str,
    num_labels: int,
    task: str | None = None,
) -> dict[str, dict[str, float]]:
    """Scores of the two blind models on these labels.

    Args:
        labels: the test labels, as in `eval.metrics.scores`.
        prior: what the training labels say: counts (C,) of the classes; the share (C,) of samples
            with each label; for regression their mean (1,).
        problem_type: what the model was trained on.
        num_labels: C.
        task: see `eval.metrics.scores`.

    Returns:
        {"majority": {metric: value}, "uniform": {metric: value}}. "uniform" holds expectations; its
        F1 is that of the expected counts, its average precision the share of the label (exact for
        many samples). Regression has no uniform guess, hence only "majority".

    Raises:
        DataError: no labelled row.
        ConfigError: a problem type without scores.
    """
    labels, prior = np.asarray(labels), np.asarray(prior, dtype=float).reshape(-1)
    if task in CLINICAL:  # the majority's probabilities count, too: those of the training labels
        logits = np.tile(np.log(np.maximum(prior / prior.sum(), TINY)), (len(labels), 1))
    elif problem_type == SINGLE_LABEL:
        logits = np.tile(prior, (len(labels), 1))
    elif problem_type == MULTI_LABEL:
        logits = np.tile(prior - 0.5, (len(labels), 1))  # a label that most samples have
    else:
        logits = np.full(len(labels), prior.mean())
    kind: dict[str, Any] = {"problem_type": problem_type, "num_labels": num_labels, "task": task}
    levels = {"majority": scores(logits, labels, **kind)}
    labels = labels[has_label(labels)]
    if problem_type == SINGLE_LABEL:
        levels["uniform"] = _uniform_single(labels, num_labels)
        if task in (BINARY, BINARY_AUPRC, CLINICAL_BINARY):
            levels["uniform"] |= {"auroc": 0.5, "auprc": float(labels.mean())}
        if task in CLINICAL:
            found = uniform_clinical(labels, num_labels)
            levels["uniform"] |= {key: found[key] for key in found if key in levels["majority"]}
    elif task == KNEE:
        levels["uniform"] = dict.fromkeys(levels["majority"], 0.5)
    elif task == VQA:
        levels["uniform"] = {"vqa_score": float(labels.mean())}
    elif problem_type == SURVIVAL:
        levels["uniform"] = dict.fromkeys(levels["majority"], 0.5)
    elif problem_type != REGRESSION:
        levels["uniform"] = _uniform_multi(labels)
    return levels


def best_chance(levels: dict[str, dict[str, float]], *, metric: str) -> float | None:
    """The better of the blind models at one metric: the level that a model has to beat."""
    values = [level[metric] for level in levels.values() if metric in level]
    if not values:
        return None
    return min(values) if metric in LOWER_IS_BETTER else max(values)


def _f1(true_positive, predicted, actual):
    """F1 from (expected) counts."""
    return 2 * true_positive / (predicted + actual)


def _uniform_single(labels_N: np.ndarray, num_labels: int) -> dict[str, float]:
    count_C = np.bincount(labels_N.astype(int), minlength=num_labels)
    count_C = count_C[count_C > 0]  # the metrics average over the classes that occur
    f1_C = _f1(count_C / num_labels, len(labels_N) / num_labels, count_C)
    return {
        "accuracy": 1 / num_labels,
        "balanced_accuracy": 1 / num_labels,
        "macro_f1": float(f1_C.mean()),
        "weighted_f1": float((f1_C * count_C).sum() / count_C.sum()),
    }


def _uniform_multi(labels_NC: np.ndarray) -> dict[str, float]:
    num_rows, num_labels = labels_NC.shape
    count_C, count_N = labels_NC.sum(0), labels_NC.sum(1)
    f1_C = _f1(count_C / 2, num_rows / 2, count_C)
    weight_C = count_C / max(count_C.sum(), 1)
    return {
        "macro_f1": float(f1_C.mean()),
        "micro_f1": float(_f1(count_C.sum() / 2, labels_NC.size / 2, count_C.sum())),
        "samples_f1": float(_f1(count_N / 2, num_labels / 2, count_N).mean()),
        "weighted_f1": float((f1_C * weight_C).sum()),
        "map": float(count_C[count_C > 0].mean() / num_rows) if count_C.any() else 0.0,
    }
