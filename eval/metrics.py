"""Scores of a task and bootstrap intervals.

The numbers come from scikit-learn; this file says which ones belong to which task and what happens
at the edges. N samples, C classes (or labels).

What published benchmarks do, and we with them unless it says otherwise:

- MM-IMDb (multi-label): macro F1 over 23 genres at probability one half, counted over plots, not
  movies. A genre that is neither present nor predicted counts 0, as in scikit-learn; torchmetrics
  before 1.0 dropped it from the mean, which gives higher numbers on small test sets.
- Food-101 (single-label): top-1 accuracy. Rows without a title are scored here; earlier loaders
  leave them out.
- Hateful Memes (binary): AUROC of the hateful class. A two-class softmax with a macro average over
  one-against-rest gives the same number.
- CMU-MOSI, CMU-MOSEI (sentiment_mosi) and CH-SIMS (sentiment_sims): see `eval.sentiment`.
- MIMIC-III's ICD-9 groups (binary_auprc): average precision of the rarer class 1, and accuracy.
- VQA v2 and VQA-VS (vqa): share of the answer that scores highest, 0, .3, .6, .9 or 1 by how many
  annotators gave it; VQA-VS's own script takes thirds of them, which is up to .1 more.
- fastMRI knee (knee_findings): area under the ROC curve of each finding and their mean; what
  depends on a threshold is in `eval.operating`.
- IEMOCAP (single-label): accuracy and F1 weighted by the classes' label counts.
- Clinical tasks (clinical_binary, clinical_classes, survival): see `eval.clinical`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
from scipy import special
from sklearn import metrics as sk

from eval import clinical, sentiment
from eval.resamples import LEVEL, draw_groups
from mm_moe.batch import IGNORED_LABEL
from mm_moe.data.schema import (
    BINARY,
    BINARY_AUPRC,
    CLINICAL_BINARY,
    CLINICAL_CLASSES,
    KNEE,
    MULTI_LABEL,
    ONE_VALUE,
    REGRESSION,
    SENTIMENT_MOSI,
    SENTIMENT_SIMS,
    SINGLE_LABEL,
    SURVIVAL,
    TASKS,
    VQA,
)
from mm_moe.errors import ConfigError, DataError
from mm_moe.registry import nearest

LOWER_IS_BETTER = frozenset({"mae", *clinical.LOWER_IS_BETTER})
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


def _auroc(labels_N: np.ndarray, score_N: np.ndarray) -> float:
    """Area under the ROC curve of class 1; one half where only one class occurs."""
    if len(np.unique(labels_N)) < 2:
        return 0.5
    return float(sk.roc_auc_score(labels_N, score_N))


def _auprc(labels_N: np.ndarray, score_N: np.ndarray) -> float:
    """Average precision of class 1; 0 where no sample has it."""
    return float(sk.average_precision_score(labels_N, score_N)) if labels_N.any() else 0.0


def _mean_auprc(labels_NC: np.ndarray, score_NC: np.ndarray) -> float:
    """Mean average precision (mAP) over the labels that some sample has; 0 without one."""
    columns = np.flatnonzero(labels_NC.any(0))
    values = [_auprc(labels_NC[:, c], score_NC[:, c]) for c in columns]
    return float(np.mean(values)) if values else 0.0


def _auroc_of(label: int) -> Metric:
    return lambda labels_NC, score_NC: _auroc(labels_NC[:, label], score_NC[:, label])


def _mean_auroc(labels_NC: np.ndarray, score_NC: np.ndarray) -> float:
    """Mean area under the ROC curve over the labels that some rows have and some have not."""
    both = np.flatnonzero(labels_NC.any(0) & ~labels_NC.all(0))
    values = [_auroc(labels_NC[:, c], score_NC[:, c]) for c in both]
    return float(np.mean(values)) if values else 0.5


def _vqa_score(labels_NC: np.ndarray, score_NC: np.ndarray) -> float:
    """Mean share of the answer with the highest score."""
    return float(_vqa_score_of_rows(labels_NC, score_NC).mean())


def _vqa_score_of_rows(labels_NC: np.ndarray, score_NC: np.ndarray) -> np.ndarray:
    return np.take_along_axis(labels_NC, score_NC.argmax(-1)[:, None], axis=-1)[:, 0]


Metric = Callable[[np.ndarray, np.ndarray], float]

_SINGLE: dict[str, Metric] = {
    "accuracy": sk.accuracy_score,
    "balanced_accuracy": _balanced_accuracy,
    "macro_f1": _macro_f1,
    "weighted_f1": sentiment.weighted_f1,
}
_VALUE: dict[str, Metric] = {"mae": sk.mean_absolute_error, "corr": _corr}

KNEE_LABELS = ("abnormal", "mtear", "acl", "cartilage")
KNEE_AUROC = {f"auroc_{label}": _auroc_of(n) for n, label in enumerate(KNEE_LABELS)}

# Task -> metric name -> function(labels, predicted); the first one is the headline.
METRICS: dict[str, dict[str, Metric]] = {
    SINGLE_LABEL: _SINGLE,
    BINARY: {"auroc": _auroc, "auprc": _auprc, **_SINGLE},
    BINARY_AUPRC: {"auprc": _auprc, "accuracy": sk.accuracy_score, "auroc": _auroc, **_SINGLE},
    CLINICAL_BINARY: {"auroc": _auroc, "auprc": _auprc, **clinical.BINARY_SCORES, **_SINGLE},
    CLINICAL_CLASSES: {**_SINGLE, **clinical.CLASS_SCORES},
    SURVIVAL: clinical.SURVIVAL_SCORES,
    MULTI_LABEL: {
        **{f"{name}_f1": _f1(name) for name in ("macro", "micro", "samples", "weighted")},
        "map": _mean_auprc,
    },
    KNEE: {"mean_auroc": _mean_auroc, **KNEE_AUROC},
    VQA: {"vqa_score": _vqa_score},
    REGRESSION: _VALUE,
    SENTIMENT_MOSI: {
        **_VALUE,
        "acc7": partial(sentiment.rounded_accuracy, limit=3.0),
        "acc5": partial(sentiment.rounded_accuracy, limit=2.0),
        "acc2": sentiment.acc2_mosi,
        "f1": sentiment.f1_mosi,
        "acc2_with_zero": sentiment.acc2_with_zero,
    },
    SENTIMENT_SIMS: {
        **_VALUE,
        "acc5": partial(sentiment.sims_accuracy, bins=5),
        "acc3": partial(sentiment.sims_accuracy, bins=3),
        "acc2": partial(sentiment.sims_accuracy, bins=2),
        "f1": sentiment.f1_sims,
    },
}
# of scores, not of decisions
RANKING = frozenset({"auroc", "auprc", "map", "vqa_score", "mean_auroc", *KNEE_AUROC})


def headline(task: str) -> str:
    """Name of the metric that stands for a task.

    Raises:
        ConfigError: the task has no scores.
    """
    return next(iter(_metrics_of(task)))


def has_label(labels: np.ndarray) -> np.ndarray:
    """Rows that take part in the scores: bool (N,), False where `IGNORED_LABEL` stands."""
    ignored = np.asarray(labels) == IGNORED_LABEL
    return ~(ignored.any(-1) if ignored.ndim > 1 else ignored)


def scores(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    problem_type: str,
    num_labels: int,
    task: str | None = None,
) -> dict[str, float]:
    """All scores of one set of predictions.

    Args:
        logits: (N, C); regression (N,) or (N, 1). Multi-label predicts a label where its logit is
            above 0 (probability above one half).
        labels: class indices (N,), zeros and ones (N, C), or values (N,). Rows that hold
            `IGNORED_LABEL` are left out.
        problem_type: what the model was trained on.
        num_labels: C.
        task: a key of `METRICS`; by default the problem type.

    Returns:
        Metric name -> value. Single-label `balanced_accuracy` and `macro_f1` average over the
        classes that occur among the labels. `map` leaves out labels that no sample has.

    Raises:
        ConfigError: a task without scores, or one that does not fit the problem type.
        DataError: no labelled row, shapes that do not fit, or predictions that are not finite.
    """
    of = _metrics_of(task or problem_type)
    found = _Predicted(logits, labels, problem_type=problem_type, num_labels=num_labels, task=task)
    return {name: found.value(name, metric) for name, metric in of.items()}


def interval(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    metric: str,
    problem_type: str,
    num_labels: int,
    task: str | None = None,
    groups: np.ndarray | None = None,
    num_resamples: int = 500,
    level: float = LEVEL,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of one metric over the samples, or over groups of them.

    Rows of one group are drawn together: they are no independent samples. `groups` names the group
    of each row (N,); by default every row is its own.

    The interval holds for new samples of the same distribution and this one trained model; it says
    nothing about another training seed.
    """
    found = _Predicted(logits, labels, problem_type=problem_type, num_labels=num_labels, task=task)
    of = _metrics_of(task or problem_type)[metric]
    kept = has_label(labels)
    names = np.arange(kept.sum()) if groups is None else np.asarray(groups)[kept]
    draws = draw_groups(names, num_resamples=num_resamples, seed=seed)
    if metric == "vqa_score":  # a row is as wide as the vocabulary: do not copy them
        share = found.share_of_choice()
        values = [share[rows].mean() for rows in draws]
    else:
        values = [found.value(metric, of, rows=rows) for rows in draws]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resampled(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    rows: Iterable[np.ndarray],
    metric: str,
    problem_type: str,
    num_labels: int,
    task: str | None = None,
) -> np.ndarray:
    """One metric on all rows and on each of R resamples of them: (1 + R,).

    Args:
        logits: as in `scores`.
        labels: as in `scores`. Rows without a label are left out of a resample, so that the same
            `rows` pair the samples of two models.
        rows: R arrays of row numbers.
        metric: a metric of the task.
        problem_type: as in `scores`.
        num_labels: as in `scores`.
        task: as in `scores`.

    Raises:
        ConfigError: as `scores`.
        DataError: as `scores`.
    """
    labels = np.asarray(labels)
    of = _metrics_of(task or problem_type)[metric]
    found = _Predicted(logits, labels, problem_type=problem_type, num_labels=num_labels, task=task)
    kept = has_label(labels)
    place = np.cumsum(kept) - 1  # row -> place among the labelled ones
    whole = found.value(metric, of)
    draws = (place[one[kept[one]]] for one in rows)
    if metric == "accuracy":  # the mean of a value per row: thousands of times cheaper so
        hit = (found.labels == found.decided).astype(float)
        return np.array([whole, *(hit[drawn].mean() for drawn in draws)])
    if metric == "vqa_score":
        share = found.share_of_choice()
        return np.array([whole, *(share[drawn].mean() for drawn in draws)])
    if metric == "macro_f1" and problem_type == MULTI_LABEL:
        return np.array([whole, *(found.macro_f1_of_labels(drawn) for drawn in draws)])
    return np.array([whole, *(found.value(metric, of, rows=drawn) for drawn in draws)])


def _metrics_of(task: str) -> dict[str, Metric]:
    if task not in METRICS:
        raise ConfigError(f"task {task!r} has no scores; {nearest(task, list(METRICS))}")
    return METRICS[task]


class _Predicted:
    """Checked labels, decisions and ranking scores of the rows that have a label."""

    def __init__(
        self,
        logits: np.ndarray,
        labels: np.ndarray,
        *,
        problem_type: str,
        num_labels: int,
        task: str | None,
    ) -> None:
        _check_task(task or problem_type, problem_type=problem_type, num_labels=num_labels)
        logits, labels = _labelled(
            logits, labels, width=1 if problem_type in ONE_VALUE else num_labels
        )
        self.prob = logits
        if problem_type == SINGLE_LABEL:
            self.labels, self.decided = labels.astype(int), logits.argmax(-1)
            self.prob = special.softmax(logits.astype(float), axis=-1)
            # Of two classes, the probability of the second one grows with this difference.
            self.ranking = logits[:, 1] - logits[:, 0] if num_labels == 2 else logits
        elif problem_type == MULTI_LABEL:
            self.labels = labels if task == VQA else labels.astype(int)
            self.decided = (logits > 0).astype(int)
            self.ranking = logits
        elif problem_type == SURVIVAL:
            self.labels, self.decided = labels, logits.reshape(-1)
            self.ranking = self.decided
        else:
            self.labels, self.decided = labels.reshape(-1), logits.reshape(-1)
            self.ranking = self.decided

    def value(self, name: str, metric: Metric, rows: np.ndarray | slice = slice(None)) -> float:
        """One metric over some rows."""
        predicted = self.ranking if name in RANKING else self.decided
        if name in clinical.OF_PROBABILITIES:
            predicted = self.prob
        return float(metric(self.labels[rows], predicted[rows]))

    def share_of_choice(self) -> np.ndarray:
        """Soft targets: the share (N,) of each row's highest answer."""
        return _vqa_score_of_rows(self.labels, self.ranking)

    def macro_f1_of_labels(self, rows: np.ndarray) -> float:
        """Multi-label macro F1 over some rows from counts: scikit-learn's number, much sooner."""
        labels_NC, decided_NC = self.labels[rows], self.decided[rows]
        true_C = (labels_NC & decided_NC).sum(0)
        both_C = labels_NC.sum(0) + decided_NC.sum(0)
        return float(np.mean(2 * true_C / np.maximum(both_C, 1)))


def _check_task(task: str, *, problem_type: str, num_labels: int) -> None:
    """Refuse a task whose scores cannot be had from these predictions."""
    _metrics_of(task)
    if TASKS[task] != problem_type:
        raise ConfigError(
            f"task {task!r} scores {TASKS[task]} models, the data are {problem_type}."
        )
    if task == KNEE and num_labels != len(KNEE_LABELS):
        raise ConfigError(f"task {task!r} needs four labels, the data have {num_labels}.")
    if task in (BINARY, BINARY_AUPRC, CLINICAL_BINARY) and num_labels != 2:
        raise ConfigError(f"task {task!r} needs two classes, the data have {num_labels}.")


def _labelled(
    logits: np.ndarray, labels: np.ndarray, *, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of the rows that have a label, after checking them."""
    logits, labels = np.asarray(logits), np.asarray(labels)
    rows = has_label(labels)
    if not rows.any():
        raise DataError(
            f"none of the {len(labels)} rows has a label, so there is nothing to score."
        )
    if logits.reshape(len(labels), -1).shape[1] != width:
        raise DataError(
            f"predictions of shape {logits.shape} do not fit {width} outputs of {len(labels)} rows."
        )
    logits, labels = logits[rows], labels[rows]
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits.reshape(len(labels), -1))).any(-1).sum())
        raise DataError(f"the predictions of {bad} of {len(labels)} rows are not finite.")
    return logits, labels
