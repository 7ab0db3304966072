"""Scores of clinical tasks: calibration, probabilities, and the order of survival times.

N samples, C classes. Expected calibration error (ECE): 15 bins of equal width over [0, 1], the mean
over the samples of |mean confidence - observed share| of their bin. For two classes the confidence
is the probability of class 1 and the share is how often it occurs; for more, the probability of the
decided class and how often it is right (Guo et al. 2017). The Brier score of two classes is the
mean squared distance of the probability of class 1 from 0 or 1.

Survival: Harrell's concordance, and Uno's, which weighs pairs by the chance not to be censored
(Uno et al. 2011); that chance is estimated on the scored rows themselves. Both come from
scikit-survival, which is optional.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from sklearn import metrics as sk

from mm_moe.errors import ConfigError

NUM_BINS = 15
LOWER_IS_BETTER = frozenset({"brier", "ece"})
OF_PROBABILITIES = frozenset({"brier", "ece", "auroc_ovr"})  # (N, C), not decisions
Score = Callable[[np.ndarray, np.ndarray], float]


def calibration_error(confidence_N: np.ndarray, hit_N: np.ndarray) -> float:
    """ECE of confidences in [0, 1] about something that is (1) or is not (0)."""
    place_N = np.clip(np.ceil(confidence_N * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    apart_B = np.bincount(place_N, confidence_N - hit_N, minlength=NUM_BINS)
    return float(np.abs(apart_B).sum() / len(confidence_N))


def ece(labels_N: np.ndarray, prob_NC: np.ndarray) -> float:
    """ECE, of class 1 where there are two classes, else of the decision."""
    if prob_NC.shape[1] == 2:
        return calibration_error(prob_NC[:, 1], labels_N == 1)
    return calibration_error(prob_NC.max(-1), prob_NC.argmax(-1) == labels_N)


def brier(labels_N: np.ndarray, prob_NC: np.ndarray) -> float:
    """Mean squared distance of the probability of class 1 from 0 or 1."""
    return float(np.square(prob_NC[:, 1] - (labels_N == 1)).mean())


def auroc_ovr(labels_N: np.ndarray, prob_NC: np.ndarray) -> float:
    """Mean area under the ROC curve, each class against the rest, over the classes that occur.

    One half where only one class occurs.
    """
    classes = np.unique(labels_N)
    if len(classes) < 2:
        return 0.5
    return float(np.mean([sk.roc_auc_score(labels_N == c, prob_NC[:, c]) for c in classes]))


def c_index(labels_N2: np.ndarray, risk_N: np.ndarray) -> float:
    """Harrell's concordance of risk and time; one half where no two rows can be compared."""
    sksurv = survival_metrics()
    event_N, time_N = labels_N2[:, 1] > 0, labels_N2[:, 0].astype(float)
    if not _comparable(time_N, event_N):
        return 0.5
    return float(sksurv.concordance_index_censored(event_N, time_N, risk_N.astype(float))[0])


def c_index_ipcw(labels_N2: np.ndarray, risk_N: np.ndarray) -> float:
    """Uno's concordance; one half where no two rows can be compared."""
    sksurv = survival_metrics()
    event_N, time_N = labels_N2[:, 1] > 0, labels_N2[:, 0].astype(float)
    if not _comparable(time_N, event_N):
        return 0.5
    rows = np.array([*zip(event_N, time_N, strict=True)], dtype=[("event", "?"), ("time", "<f8")])
    # below the last time the chance not to be censored is above 0, and nothing can follow it
    tau = time_N.max()
    return float(sksurv.concordance_index_ipcw(rows, rows, risk_N.astype(float), tau=tau)[0])


def _comparable(time_N: np.ndarray, event_N: np.ndarray) -> bool:
    """Whether some event came before another row's time."""
    return bool(event_N.any() and time_N[event_N].min() < time_N.max())


def survival_metrics() -> Any:
    """scikit-survival's metrics.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from sksurv import metrics
    except ImportError as error:
        raise ConfigError(
            "scores of survival need scikit-survival; pip install -e '.[clinical]'."
        ) from error
    return metrics


BINARY_SCORES: Mapping[str, Score] = MappingProxyType({"brier": brier, "ece": ece})
CLASS_SCORES: Mapping[str, Score] = MappingProxyType({"auroc_ovr": auroc_ovr, "ece": ece})
SURVIVAL_SCORES: dict[str, Score] = {"c_index": c_index, "c_index_ipcw": c_index_ipcw}


def uniform_clinical(labels_N: np.ndarray, num_labels: int) -> dict[str, float]:
    """Scores of a model that gives every class the same probability."""
    if num_labels > 2:  # of a fair die's decisions one in C is right, as often as it says
        return {"auroc_ovr": 0.5, "ece": 0.0}
    error = ece(labels_N, np.full((len(labels_N), num_labels), 1 / num_labels))
    return {"brier": 0.25, "auroc_ovr": 0.5, "ece": error}
