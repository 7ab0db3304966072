"""Intervals over samples (bootstrap, in whole groups) and over seeds.

N rows, R resamples.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95


def draw_groups(groups: np.ndarray, *, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Rows of R resamples, each of as many whole groups as there are, drawn with replacement.

    The same groups give the same rows, whatever the model. The plots of one movie and the two
    drawings of an emoji go together; a sample without a group is one of its own.

    Args:
        groups: names (N,).
        num_resamples: R.
        seed: of the draws.
    """
    _, group_N, sizes_G = np.unique(groups, return_inverse=True, return_counts=True)
    members = np.split(np.argsort(group_N, kind="stable"), np.cumsum(sizes_G)[:-1])
    generator = np.random.default_rng(seed)
    alone = np.concatenate(members) if sizes_G.max() == 1 else None
    for _ in range(num_resamples):
        drawn_G = generator.integers(0, len(members), len(members))
        if alone is not None:
            yield alone[drawn_G]
        else:
            yield np.concatenate([members[group] for group in drawn_G])


def interval_of(values: np.ndarray) -> dict[str, float]:
    """Difference, percentile interval and two-sided p of (1 + R,) values, the first on all rows.

    p is twice the smaller share of resamples on either side of zero, those at zero counted on both,
    with one added to count and total, so that it is never zero.
    """
    resamples = values[1:]
    low, high = np.quantile(resamples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    fewer = min(int((resamples <= 0).sum()), int((resamples >= 0).sum()))
    p = min(1.0, 2 * (fewer + 1) / (len(resamples) + 1))
    return {"difference": float(values[0]), "low": float(low), "high": float(high), "p": p}


def over_seeds(values: Sequence[float]) -> tuple[float, float] | None:
    """Interval of the mean of one value per seed, by Student's t; None for a single seed.

    It speaks about further trainings scored on the same samples. With so few values a bootstrap
    would be too narrow: of two it knows three means.
    """
    if len(values) < 2:
        return None
    mean, error = statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error
    return mean - half, mean + half
