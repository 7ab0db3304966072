"""What a sample needs its modalities for: redundancy, uniqueness or synergy.

From what each modality alone predicts and from the label: all right (R), some right (U), all wrong
in the same way (AS), all wrong in different ways (DS). Source: Mixtures of Multimodal Interaction
Experts (Yu et al., 2024), which has two modalities and two classes, where DS cannot occur and U is
one category.

A category holds the label: with two classes, R and the predictions give it, and so do AS and the
predictions. It may supervise training rows; as an input of rows to be scored it leaks the answer.

Axes: N samples, M modalities, C classes, Q fine categories (2**M + 1), K coarse categories (4).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mm_moe.errors import DataError

REDUNDANT, UNIQUE, AGREED, DISAGREED = "R", "U", "AS", "DS"
COARSE = (REDUNDANT, UNIQUE, AGREED, DISAGREED)  # a coarse code is the place in here
NONE = -1  # code of a sample without category, and of a prediction that is missing


def num_categories(num_modalities: int) -> int:
    """Q: fine categories over so many modalities."""
    return 2**num_modalities + 1


def category_names(modalities: Sequence[str]) -> tuple[str, ...]:
    """Names of the fine categories in the order of their codes.

    Code 0 is R. Code s from 1 to 2**M - 2 is U of the set s of modalities that are right, bit m for
    modality m ("U_text", and with three modalities also "U_text+audio"). Then AS and DS.
    """
    count = 2 ** len(modalities)
    unique = (
        "+".join(name for m, name in enumerate(modalities) if code >> m & 1)
        for code in range(1, count - 1)
    )
    return (REDUNDANT, *(f"{UNIQUE}_{names}" for names in unique), AGREED, DISAGREED)


def coarse_codes(code_N: np.ndarray, *, num_modalities: int) -> np.ndarray:
    """Fine codes as places in `COARSE`; `NONE` stays."""
    agreed = 2**num_modalities - 1
    code_N = np.asarray(code_N)
    unique_N = (code_N > 0) & (code_N < agreed)
    return np.select([code_N == agreed, code_N == agreed + 1, unique_N], [2, 3, 1], code_N)


def categorise(predictions: Sequence[np.ndarray] | np.ndarray, *, labels: np.ndarray) -> np.ndarray:
    """Fine category (N,) int64 of each sample, `NONE` where a prediction or the label is missing.

    The paper's table for M = 2, C = 2, and its natural continuation: predictions that all equal
    the label are R, all equal and wrong AS, different with none right DS, and otherwise U of the
    set of modalities that are right. With M > 2 that set may have several members.

    Args:
        predictions: M arrays (N,) of class indices, in the order of the modalities; `NONE` where a
            modality gives none.
        labels: class indices (N,).

    Raises:
        DataError: fewer than two modalities, or arrays of different lengths.
    """
    check_parts(predictions, labels)
    prediction_MN = np.stack([np.asarray(part, dtype=np.int64) for part in predictions])
    num_modalities = len(prediction_MN)
    right_MN = prediction_MN == np.asarray(labels)
    bit_M1 = 2 ** np.arange(num_modalities)[:, None]
    code_N = (right_MN * bit_M1).sum(0)
    full = 2**num_modalities - 1
    same_N = (prediction_MN == prediction_MN[0]).all(0)
    wrong_N = code_N == 0
    code_N[code_N == full] = 0
    code_N[wrong_N] = np.where(same_N, full, full + 1)[wrong_N]
    code_N[(prediction_MN < 0).any(0) | (np.asarray(labels) < 0)] = NONE
    return code_N


def check_parts(parts: Sequence[np.ndarray] | np.ndarray, labels: np.ndarray) -> None:
    """Refuse fewer than two modalities, and arrays of different lengths.

    Raises:
        DataError: see above.
    """
    lengths = {len(part) for part in (*parts, labels)}
    if len(parts) < 2 or len(lengths) != 1:
        raise DataError(
            f"categories need the predictions of two or more modalities and as many labels; got "
            f"{len(parts)} modalities and lengths {sorted(lengths)}."
        )


def soft_categories(
    probabilities: Sequence[np.ndarray] | np.ndarray, *, labels: np.ndarray
) -> np.ndarray:
    """Weights (N, Q) of the fine categories, each row summing to 1.

    They are the chances of `categorise`'s outcomes when each modality draws its prediction from its
    own probabilities, independently: with one-hot rows the hard category, with M = 2 and C = 2 the
    weights r = P_t(y) P_v(y), s = (1 - P_t(y)) (1 - P_v(y)) and u = the rest, split by modality.

    Args:
        probabilities: M arrays (N, C) whose rows sum to 1; NaN in a row that is missing.
        labels: class indices (N,).

    Returns:
        NaN throughout in rows where something is missing.

    Raises:
        DataError: as in `categorise`.
    """
    check_parts(probabilities, labels)
    prob_MNC = np.asarray(probabilities, dtype=np.float64)
    num_modalities, num_rows, _ = prob_MNC.shape
    label_N = np.asarray(labels)
    right_MN = prob_MNC[:, np.arange(num_rows), np.maximum(label_N, 0)]
    full = 2**num_modalities - 1
    weight_NQ = np.empty((num_rows, full + 2))
    for code in range(full + 1):
        on_M1 = (code >> np.arange(num_modalities) & 1).astype(bool)[:, None]
        weight_NQ[:, code] = np.where(on_M1, right_MN, 1 - right_MN).prod(0)
    wrong_N, weight_NQ[:, 0] = weight_NQ[:, 0].copy(), weight_NQ[:, full]
    agreed_N = prob_MNC.prod(0).sum(-1) - right_MN.prod(0)
    weight_NQ[:, full] = np.clip(agreed_N, 0, wrong_N)
    weight_NQ[:, full + 1] = wrong_N - weight_NQ[:, full]
    weight_NQ[label_N < 0] = np.nan
    return weight_NQ


def coarse_weights(weight_NQ: np.ndarray) -> np.ndarray:
    """Weights (N, K) of R, U, AS and DS from those of the fine categories."""
    return np.stack(
        [weight_NQ[:, 0], weight_NQ[:, 1:-2].sum(-1), weight_NQ[:, -2], weight_NQ[:, -1]], axis=-1
    )
