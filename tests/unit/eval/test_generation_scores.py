"""Scores of rebuilt and generated cells, by hand."""

import numpy as np
import pytest

from eval.generation_scores import (
    by_type,
    critic_auc,
    cross_correlation,
    pearson,
    r_squared,
    reconstruction,
)
from mm_moe.errors import DataError

TRUE = np.array([[1.0, 2, 3, 5], [4, 4, 4, 5], [2, 0, 1, 5]])
FOUND = np.array([[2.0, 4, 6, 5], [1, 2, 3, 5], [2, 0, 1, 5]])


def test_pearson_and_r_squared_by_hand():
    # genes: (1,4,2) with (2,1,2): deviations (-4/3, 5/3, -1/3) and (1/3, -2/3, 1/3)
    r = pearson(TRUE, FOUND, axis=0)
    assert r[0] == pytest.approx((-4 - 10 - 1) / 9 / np.sqrt(42 / 9 * 6 / 9))
    assert np.isnan(r[3])  # a constant gene
    r2 = r_squared(TRUE, FOUND, axis=0)
    assert r2[0] == pytest.approx(1 - (1 + 9 + 0) / (42 / 9))
    assert np.isnan(r2[3])
    assert pearson(TRUE, FOUND, axis=1)[2] == pytest.approx(1)
    assert r_squared(TRUE, TRUE, axis=1).tolist() == [1, 1, 1]


def test_constant_genes_are_masked_and_counted():
    found = reconstruction(TRUE, TRUE)
    assert found == {
        "cell_r": pytest.approx(1),
        "cell_r2": 1,
        "gene_r": pytest.approx(1),
        "gene_r2": 1,
        "constant_genes": 1,
        "mse": 0,
    }
    rounded = TRUE + 0.1 - 0.1  # a constant that is not exactly one
    assert reconstruction(rounded, TRUE)["constant_genes"] == 1
    flat = reconstruction(np.ones((3, 2)), np.ones((3, 2)))
    assert np.isnan(flat["cell_r"])
    assert flat["constant_genes"] == 2
    with pytest.raises(DataError, match="same cells and genes"):
        reconstruction(TRUE, FOUND[:2])


def test_cross_correlation_leaves_the_diagonal_out():
    up, down = [1.0, 2, 3], [3.0, 2, 1]
    # within cis: one pair, r = -1; within cross: r = 1; between: two of 1, two of -1
    found = cross_correlation(np.array([up, down]), np.array([up, up]))
    assert found["cis"] == pytest.approx(-1)
    assert found["cross"] == pytest.approx(1)
    assert found["comb"] == pytest.approx(0)
    paired = cross_correlation(np.array([up, down]), np.array([up, up]), paired=True)
    assert paired["comb"] == pytest.approx((1 + 1 - 1 - 1 - (1 - 1)) / 2)
    rng = np.random.default_rng(0)
    cis, cross = rng.random((5, 7)), rng.random((4, 7))
    r = np.corrcoef(np.vstack([cis, cross]))
    found = cross_correlation(cis, cross)
    assert found["cis"] == pytest.approx((r[:5, :5].sum() - 5) / 20)
    assert found["cross"] == pytest.approx((r[5:, 5:].sum() - 4) / 12)
    assert found["comb"] == pytest.approx(r[:5, 5:].mean())
    assert found["rel"] == pytest.approx(2 * found["comb"] / (found["cis"] + found["cross"]))


def test_profiles_of_types_by_hand():
    real = np.array([[0, 1, 2], [0, 1, 2], [2, 1, 0.0]])
    made = np.array([[0, 2, 4], [4, 2, 0.0], [9, 9, 9]])
    found = by_type(made, ["a", "b", "z"], real, ["a", "a", "b"])
    assert found["r"] == pytest.approx({"a": 1, "b": 1})
    assert found["own_first"] == 1
    assert found["margin"] == pytest.approx(2)
    swapped = by_type(made, ["b", "a", "z"], real, ["a", "a", "b"])
    assert swapped["mean_r"] == pytest.approx(-1)
    assert swapped["own_first"] == 0
    with pytest.raises(DataError, match="no type in common"):
        by_type(made, ["x"] * 3, real, ["a"] * 3)


def test_a_critic_tells_what_differs_and_nothing_else():
    rng = np.random.default_rng(0)
    real, same = rng.normal(size=(150, 8)), rng.normal(size=(150, 8))
    assert abs(critic_auc(real, same) - 0.5) < 0.12
    assert critic_auc(real, same + [2] * 8) > 0.99
    spread = same * 3  # no line parts them
    assert critic_auc(real, spread) < 0.65
    assert critic_auc(real, spread, net=True, folds=2) > 0.8
    with pytest.raises(DataError, match="at least two"):
        critic_auc(real[:1], same)
