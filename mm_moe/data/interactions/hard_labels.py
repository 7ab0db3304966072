"""From a labeller's scores to one prediction per sample: confidence filter, threshold, balance.

Two ways. `hard_labels` is the published one: it drops unsure rows and evens out the predictions on
the training split alone, so that a category means something else there than in the test split.
`calibrate` is ours: it finds the threshold on the training split, and that holds on every split.

Axes: N samples, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mm_moe.data.interactions.categories import NONE
from mm_moe.errors import ConfigError

SENTINEL = -10000.0  # stands in published files where an answer was not among the likely ones
MIN_GAP, BALANCE = 0.1, 0.2  # of the paper, on its training split
GAPS = ("ratio", "difference")  # its measures of confidence: for images, for text
TRAIN = "train"


@dataclass(frozen=True)
class UniScores:
    """What one modality alone says about some samples.

    Attributes:
        ids: N sample ids.
        modality: its name.
        score_NC: scores of the classes (with two: no, yes), not negative but for `SENTINEL`; they
            need not sum to 1. NaN: the labeller said nothing.
    """

    ids: tuple[str, ...]
    modality: str
    score_NC: np.ndarray

    @property
    def missing_N(self) -> np.ndarray:
        """Whether the labeller said nothing: NaN, no class likely enough, or a total of 0."""
        return ~(self._likely().sum(-1) > 0)

    @property
    def probability_NC(self) -> np.ndarray:
        """Scores that sum to 1; a sentinel counts as 0, and a missing row is NaN."""
        likely_NC = self._likely()
        total_N1 = likely_NC.sum(-1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(total_N1 > 0, likely_NC / total_N1, np.nan)

    def _likely(self) -> np.ndarray:
        return np.where(self.score_NC <= SENTINEL, 0.0, self.score_NC)


def confidence_gap(score_N2: np.ndarray, *, kind: str) -> np.ndarray:
    """The paper's confidence (N,): |yes - no|, for images over their sum.

    A sentinel enters as the number that it is, so that a row with one passes any filter, as in the
    release; a row with two has the gap 0.

    Raises:
        ConfigError: an unknown kind.
    """
    if kind not in GAPS:
        raise ConfigError(f"the gap {kind!r} is unknown; it is {' or '.join(GAPS)}.")
    gap_N = np.abs(score_N2[:, 1] - score_N2[:, 0])
    if kind == "difference":
        return gap_N
    total_N = score_N2.sum(-1)
    return np.divide(gap_N, total_N, out=np.zeros_like(gap_N), where=total_N != 0)


def balanced(prediction_N: np.ndarray, *, yes_N: np.ndarray, bound: float) -> np.ndarray:
    """Predictions whose share of ones lies within [bound, 1 - bound], by the scores of yes.

    Too few ones: the floor(bound N) highest scores become 1 and the others 0. Too many: the
    floor((1 - bound) N) highest. Ties go to the earlier row.
    """
    share, count = prediction_N.mean() if len(prediction_N) else 0.5, len(prediction_N)
    if share < bound:
        ones = int(bound * count)
    elif share > 1 - bound:
        ones = int((1 - bound) * count)
    else:
        return prediction_N
    new_N = np.zeros_like(prediction_N)
    new_N[np.argsort(-yes_N, kind="stable")[:ones]] = 1
    return new_N


def hard_labels(
    scores: UniScores,
    *,
    split: str,
    gap: str = "ratio",
    min_gap: float | None = MIN_GAP,
    balance: float = BALANCE,
) -> np.ndarray:
    """The paper's predictions (N,): 0, 1, or `NONE` for a row that its filter drops.

    Filter and balance act on the split "train" only. Its variant for the fuser is `min_gap=None,
    balance=0`: every row keeps its prediction.

    Args:
        scores: two classes, in the order no, yes.
        split: the split's name, in our words.
        gap: measure of confidence, "ratio" (images) or "difference" (text).
        min_gap: rows with a gap of no more than this are dropped; None: none.
        balance: lowest share of either answer.

    Raises:
        ConfigError: other than two classes, or a number out of range.
    """
    _check(scores, balance)
    score_N2 = np.nan_to_num(scores.score_NC, nan=SENTINEL)
    prediction_N = (score_N2[:, 1] > score_N2[:, 0]).astype(np.int64)
    if split != TRAIN:
        return prediction_N
    kept_N = np.ones(len(prediction_N), dtype=bool)
    if min_gap is not None:
        kept_N = confidence_gap(score_N2, kind=gap) > min_gap
    prediction_N[kept_N] = balanced(prediction_N[kept_N], yes_N=score_N2[kept_N, 1], bound=balance)
    prediction_N[~kept_N] = NONE
    return prediction_N


def _check(scores: UniScores, balance: float) -> None:
    if scores.score_NC.shape[1] != 2:
        raise ConfigError(
            f"the paper's labels and a balance are for two classes, {scores.modality!r} has scores "
            f"for {scores.score_NC.shape[1]}; take --mode calibrated without --balance."
        )
    if not 0 <= balance <= 0.5:
        raise ConfigError(f"balance ({balance}) is the lowest share of an answer, from 0 to 0.5.")


@dataclass(frozen=True)
class Calibration:
    """How scores of one modality become predictions, the same on every split.

    Attributes:
        threshold: with two classes, the answer is yes where its probability is above this; None:
            the likeliest class (ties to the earlier one).
        min_gap: rows whose two likeliest classes are no further apart are left without prediction.
    """

    threshold: float | None = None
    min_gap: float = 0.0

    def labels(self, scores: UniScores) -> np.ndarray:
        """Predictions (N,), `NONE` where the scores are missing or too close."""
        missing_N = scores.missing_N
        probability_NC = np.where(missing_N[:, None], 0.0, scores.probability_NC)
        if self.threshold is None:
            prediction_N = probability_NC.argmax(-1)
        else:
            prediction_N = (probability_NC[:, 1] > self.threshold).astype(np.int64)
        top_N2 = np.sort(probability_NC, axis=-1)[:, -2:]
        unsure_N = (top_N2[:, 1] - top_N2[:, 0] <= self.min_gap) & (self.min_gap > 0)
        prediction_N[missing_N | unsure_N] = NONE
        return prediction_N


def calibrate(scores: UniScores, *, min_gap: float = 0.0, balance: float = 0.0) -> Calibration:
    """The calibration that keeps the training split's share of either answer at `balance` or more.

    The threshold stays at 0.5 where that holds already. Otherwise it lies midway between the
    probabilities of the last row that is to be yes and the first that is not.

    Args:
        scores: of the training split.
        min_gap: see `Calibration`.
        balance: for two classes only.

    Raises:
        ConfigError: a balance for other than two classes, or a number out of range.
    """
    if balance == 0:
        return Calibration(min_gap=min_gap)
    _check(scores, balance)
    yes_N = np.sort(scores.probability_NC[~scores.missing_N, 1])[::-1]
    count = len(yes_N)
    ones = int((yes_N > 0.5).sum())
    wanted = min(max(ones, int(balance * count)), int((1 - balance) * count))
    if wanted == ones or not 0 < wanted < count:
        return Calibration(threshold=0.5, min_gap=min_gap)
    return Calibration(threshold=float(yes_N[wanted - 1 : wanted + 1].mean()), min_gap=min_gap)
