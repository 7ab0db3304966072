"""Scores of cells that were rebuilt, translated or generated: pure functions of arrays.

Higher is better unless a function says otherwise; what cannot be computed is NaN, never a number
that stands for it. Where the code of D-MMVAE differs (it keeps the diagonal in its correlations,
and calls r R2) we follow the words.

N cells (n, m of two sets), G genes, L types.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mm_moe.errors import DataError

FLAT = 1e-12  # a spread relative to the size of the values, below which they are constant
Labels = Sequence[Any] | np.ndarray


def pearson(true: np.ndarray, found: np.ndarray, *, axis: int) -> np.ndarray:
    """Pearson's r along an axis; NaN where one side is constant.

    Args:
        true: (N, G).
        found: (N, G).
        axis: 1 compares cell by cell (over genes), 0 gene by gene (over cells).
    """
    a, b = _centred(true, axis), _centred(found, axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (a * b).sum(axis) / np.sqrt((a**2).sum(axis) * (b**2).sum(axis))
    return np.where(_constant(true, axis) | _constant(found, axis), np.nan, r)


def r_squared(true: np.ndarray, found: np.ndarray, *, axis: int) -> np.ndarray:
    """1 - SSE / SST along an axis, at most 1 and without a floor; NaN where `true` is constant."""
    missed = ((np.asarray(true, float) - np.asarray(found, float)) ** 2).sum(axis)
    spread = (_centred(true, axis) ** 2).sum(axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(_constant(true, axis), np.nan, 1 - missed / spread)


def reconstruction(true: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Mean r and R2 over cells and over genes, without those that are constant, which are counted.

    Raises:
        DataError: the arrays differ in shape.
    """
    if np.shape(true) != np.shape(found):
        raise DataError(
            f"rows of shape {np.shape(true)} cannot be compared with rows of {np.shape(found)}; "
            "give the same cells and genes."
        )
    return {
        "cell_r": mean(pearson(true, found, axis=1)),
        "cell_r2": mean(r_squared(true, found, axis=1)),
        "gene_r": mean(pearson(true, found, axis=0)),
        "gene_r2": mean(r_squared(true, found, axis=0)),
        "constant_genes": int(_constant(true, 0).sum()),
        "mse": float(np.mean((np.asarray(true, float) - np.asarray(found, float)) ** 2)),
    }


def cross_correlation(
    cis: np.ndarray, cross: np.ndarray, *, paired: bool = False
) -> dict[str, float]:
    """Mean r within rows decoded for their own species, within those from another, and between.

    Args:
        cis: (n, G), rows of the target species rebuilt.
        cross: (m, G), rows translated to it.
        paired: row i of both comes from one cell; such pairs are left out.

    Returns:
        "cis", "cross": mean r of two different rows of a set; "comb": of a row of each; "rel":
        2 comb / (cis + cross), 1 if translated rows are as near to rebuilt ones as these are to
        each other. Constant rows are left out.
    """
    a, b = _unit_rows(cis), _unit_rows(cross)
    found = {"cis": _mean_within(a), "cross": _mean_within(b)}
    between, pairs = a.sum(0) @ b.sum(0), len(a) * len(b)
    if paired:
        if len(a) != len(b) or len(a) != len(np.asarray(cis)):
            raise DataError("paired rows must be as many on both sides, and none constant.")
        between, pairs = between - (a * b).sum(), pairs - len(a)
    found["comb"] = float(between / pairs) if pairs else float("nan")
    found["rel"] = 2 * found["comb"] / (found["cis"] + found["cross"])
    return found


def by_type(
    generated: np.ndarray, generated_type: Labels, real: np.ndarray, real_type: Labels
) -> dict[str, Any]:
    """Mean profile of each type as generated against the real one.

    Returns:
        "r": type -> r of its two profiles; "mean_r"; "own_first": share of the types whose
        generated profile is nearer to their own real one than to any other's; "margin": mean of r
        with the own less the best other.
    """
    types = sorted(set(generated_type) & set(real_type))
    made, true = (
        np.array([np.asarray(x, float)[np.asarray(y) == t].mean(0) for t in types])
        for x, y in ((generated, generated_type), (real, real_type))
    )
    if not types:
        raise DataError("generated and real cells have no type in common.")
    r_LL = np.array([pearson(np.tile(row, (len(types), 1)), true, axis=1) for row in made])
    own = np.diag(r_LL)
    others = np.where(np.eye(len(types), dtype=bool), -np.inf, r_LL).max(1)
    return {
        "r": dict(zip(types, own.tolist(), strict=True)),
        "mean_r": mean(own),
        "own_first": float(np.mean(own > others)) if len(types) > 1 else float("nan"),
        "margin": mean(own - others) if len(types) > 1 else float("nan"),
    }


def critic_auc(
    real: np.ndarray,
    generated: np.ndarray,
    *,
    net: bool = False,
    components: int = 50,
    folds: int = 5,
    seed: int = 0,
) -> float:
    """How well a fresh critic tells real from generated rows it has not seen: 0.5 is not at all.

    Lower is better. A logistic regression (or a net with one layer of 64) on the leading principal
    components of standardised rows, cross-validated; all of it is fitted on the other folds.
    """
    x = np.concatenate([np.asarray(real, float), np.asarray(generated, float)])
    y = np.repeat([1, 0], [len(real), len(generated)])
    folds = min(folds, len(real), len(generated))
    if folds < 2:
        raise DataError("a critic needs at least two real and two generated rows.")
    width = min(components, x.shape[1], len(x) - -(-len(x) // folds))
    last = (
        MLPClassifier((64,), max_iter=100, early_stopping=len(x) > 2000, random_state=seed)
        if net
        else LogisticRegression(max_iter=1000)
    )
    critic = make_pipeline(StandardScaler(), PCA(width, random_state=seed), last)
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():  # 100 passes are what this critic is, converged or not
        warnings.simplefilter("ignore", ConvergenceWarning)
        told = cross_val_predict(critic, x, y, cv=split, method="predict_proba")[:, 1]
    return float(roc_auc_score(y, told))


def mean(values: np.ndarray) -> float:
    """The mean without NaN; NaN of nothing."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


def _centred(values: np.ndarray, axis: int) -> np.ndarray:
    values = np.asarray(values, float)
    return np.asarray(values - values.mean(axis, keepdims=True))


def _constant(values: np.ndarray, axis: int) -> np.ndarray:
    """Whether all values along an axis are equal, but for rounding."""
    values = np.asarray(values, float)
    return np.asarray(np.ptp(values, axis=axis) <= FLAT * np.abs(values).max(axis))


def _unit_rows(values: np.ndarray) -> np.ndarray:
    """Rows centred and of length 1, so that r is a product; constant ones are left out."""
    values = np.asarray(values, float)
    rows = _centred(values, 1)[~_constant(values, 1)]
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def _mean_within(unit: np.ndarray) -> float:
    """Mean r of two different rows: the sum of all products less the diagonal."""
    count = len(unit)
    if count < 2:
        return float("nan")
    return float(((unit.sum(0) ** 2).sum() - count) / (count * (count - 1)))
