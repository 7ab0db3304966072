"""Predictors of one modality from frozen features, cross-fitted: no row is judged by its own label.

A predictor that has seen a row's label is right about it more often than about new rows, so its
training rows would look redundant. Here the training rows are cut into folds, and a row's
probabilities come from the head that was fitted on the other folds; rows of other splits get those
of the head that was fitted on all training rows.

Axes: N training rows, X other rows, D width of the features, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from mm_moe.data.chance import draws
from mm_moe.errors import ConfigError, DataError

FOLDS = 5
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # inverse of the penalty; the folds choose
STEPS = 500  # of the solver


def folds_of(keys: Sequence[str], *, dataset: str, num_folds: int = FOLDS) -> np.ndarray:
    """Fold (N,) of each row, by a hash of its key: rows of one key stay together.

    Keys are ranked by their hashes and dealt in turn, so that folds have equally many keys.

    Raises:
        ConfigError: fewer than two folds, or more than keys.
    """
    distinct = sorted(set(keys), key=lambda key: draws(key, purpose="fold", dataset=dataset))
    if not 2 <= num_folds <= len(distinct):
        raise ConfigError(
            f"--folds {num_folds} must lie from 2 to the number of training rows ({len(distinct)})."
        )
    fold_of = {key: place % num_folds for place, key in enumerate(distinct)}
    return np.array([fold_of[key] for key in keys])


@dataclass
class CrossFitted:
    """A logistic regression on standardised features, cross-fitted over the training rows.

    Of `strengths`, the one with the smallest log loss over the held-out folds is taken. The choice
    sees every label once more, but is one number out of few.

    Args:
        strengths: inverse penalties to choose from.

    Attributes:
        strength: the one that was taken.
        log_loss: of the held-out rows under it.
        probability_NC: of the training rows, each from a head that did not see its fold.
    """

    strengths: Sequence[float] = STRENGTHS
    strength: float = field(init=False)
    log_loss: float = field(init=False)
    probability_NC: np.ndarray = field(init=False)

    def fit(
        self, feature_ND: np.ndarray, *, label_N: np.ndarray, fold_N: np.ndarray, num_classes: int
    ) -> CrossFitted:
        """Fit the folds' heads and the one for other rows.

        Raises:
            DataError: fewer than two classes among the rows outside some fold.
        """
        self.num_classes = num_classes
        for fold in np.unique(fold_N):
            if len(np.unique(label_N[fold_N != fold])) < 2:
                raise DataError(
                    f"the training rows outside fold {fold} have one class only; take fewer folds "
                    "or more rows."
                )
        found = []
        for strength in self.strengths:
            held_NC = np.empty((len(feature_ND), num_classes))
            for fold in np.unique(fold_N):
                out_N = fold_N == fold
                head = _head(strength, feature_ND[~out_N], label_N[~out_N])
                held_NC[out_N] = self._probabilities(head, feature_ND[out_N])
            chance_N = held_NC[np.arange(len(label_N)), label_N]
            found.append((float(-np.log(np.maximum(chance_N, 1e-12)).mean()), strength, held_NC))
        self.log_loss, self.strength, self.probability_NC = min(found, key=lambda row: row[0])
        self._all = _head(self.strength, feature_ND, label_N)
        return self

    def predict(self, feature_XD: np.ndarray) -> np.ndarray:
        """Probabilities (X, C) of rows that are not in the training split."""
        return self._probabilities(self._all, feature_XD)

    def _probabilities(self, head: Pipeline, feature_XD: np.ndarray) -> np.ndarray:
        """A class that the head has not met gets 0."""
        probability_XC = np.zeros((len(feature_XD), self.num_classes))
        if len(feature_XD):
            probability_XC[:, head.classes_] = head.predict_proba(feature_XD)
        return probability_XC


def _head(strength: float, feature_ND: np.ndarray, label_N: np.ndarray) -> Pipeline:
    head = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=STEPS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # near the end of a flat valley
        return head.fit(feature_ND, label_N)
