"""Scores of sentiment intensity, in the two conventions of the field.

CMU-MOSI and CMU-MOSEI label in [-3, 3]; CH-SIMS in [-1, 1] in steps of 0.2. The published
definitions differ, and a score of one is not a score of the other. N samples.

Numbers are rounded as numpy does, halves to the even neighbour (0.5 -> 0, 1.5 -> 2), as the field's
code does.
"""

from __future__ import annotations

import numpy as np
from sklearn import metrics as sk

# Upper edges of the bins of CH-SIMS: a value lies in the first bin whose edge is not below it.
SIMS_EDGES = {2: (0.0,), 3: (-0.1, 0.1), 5: (-0.7, -0.1, 0.1, 0.7)}
SIMS_LIMIT = 1.0  # predictions are cut here first


def rounded_accuracy(labels_N: np.ndarray, predicted_N: np.ndarray, *, limit: float) -> float:
    """Share of samples whose value, cut to [-limit, limit] and rounded, is right.

    Acc-7 has the limit 3, Acc-5 the limit 2 (MOSI and MOSEI).
    """
    cut_labels_N, cut_N = (np.clip(x, -limit, limit) for x in (labels_N, predicted_N))
    return float((np.round(cut_labels_N) == np.round(cut_N)).mean())


def signed(labels_N: np.ndarray, predicted_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Who is positive, among the samples whose label is not 0: a prediction of 0 is negative."""
    kept = labels_N != 0
    return labels_N[kept] > 0, predicted_N[kept] > 0


def acc2_mosi(labels_N: np.ndarray, predicted_N: np.ndarray) -> float:
    """Negative against positive without the samples labelled 0; 0 if there are no others."""
    labels, predicted = signed(labels_N, predicted_N)
    return float((labels == predicted).mean()) if len(labels) else 0.0


def acc2_with_zero(labels_N: np.ndarray, predicted_N: np.ndarray) -> float:
    """Negative against not negative over all samples: the older Acc-2 of MOSI and MOSEI."""
    return float(((labels_N >= 0) == (predicted_N >= 0)).mean())


def f1_mosi(labels_N: np.ndarray, predicted_N: np.ndarray) -> float:
    """F1 weighted by the classes' label counts, on the samples of `acc2_mosi`.

    The released MPLMM code hands labels and predictions over in the wrong order, which weighs by
    the predictions' counts; here the labels weigh.
    """
    return weighted_f1(*signed(labels_N, predicted_N))


def weighted_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """F1 of each class, weighted by how many samples have it; 0 without a sample."""
    if not len(labels):
        return 0.0
    return float(sk.f1_score(labels, predicted, average="weighted", zero_division=0))


def sims_bins(values_N: np.ndarray, *, bins: int) -> np.ndarray:
    """Index of each value's bin; edges belong to the lower bin, so that 0 counts as negative.

    Five bins, [-1, -.7] (-.7, -.1] (-.1, .1] (.1, .7] (.7, 1], are those of the CH-SIMS authors;
    MPLMM's "Acc-5" rounds to three.
    """
    cut_N = np.clip(np.asarray(values_N, dtype=np.float64), -SIMS_LIMIT, SIMS_LIMIT)
    # Labels come as float32: 0.1 and 0.7 are not exact there, and must stay at their edge.
    return np.digitize(np.round(cut_N, 6), SIMS_EDGES[bins], right=True)


def sims_accuracy(labels_N: np.ndarray, predicted_N: np.ndarray, *, bins: int) -> float:
    """Share of samples in the right one of 2, 3 or 5 bins."""
    return float((sims_bins(labels_N, bins=bins) == sims_bins(predicted_N, bins=bins)).mean())


def f1_sims(labels_N: np.ndarray, predicted_N: np.ndarray) -> float:
    """Weighted F1 over two bins."""
    return weighted_f1(sims_bins(labels_N, bins=2), sims_bins(predicted_N, bins=2))
