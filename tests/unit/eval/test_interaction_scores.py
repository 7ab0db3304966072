"""Scores of fused predictions, checked with a pencil and against scikit-learn."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from sklearn import metrics as sk

from eval import interaction_scores
from eval.interaction_scores import calibration_error, mcnemar, scores


def test_binary_scores_by_hand():
    # Truth 1 1 1 0 0, said 1 1 0 1 0: 2 of 3 found, 2 of 3 right when said.
    probs = np.array([[0.1, 0.9], [0.4, 0.6], [0.7, 0.3], [0.2, 0.8], [0.9, 0.1]])
    found = scores(probs, np.array([1, 1, 1, 0, 0]))
    assert_allclose([found[k] for k in ("precision", "recall", "f1")], 2 / 3)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found["log_loss"] == pytest.approx(-np.log([0.9, 0.6, 0.3, 0.2, 0.9]).mean())


def test_scores_equal_those_of_scikit_learn():
    draw = np.random.default_rng(0)
    labels, probs = draw.integers(0, 3, 200), draw.dirichlet([1, 1, 1], 200)
    found, said = scores(probs, labels), probs.argmax(-1)
    theirs = sk.precision_recall_fscore_support(
        labels, said, average="macro", labels=[0, 1, 2], zero_division=0
    )
    assert_allclose([found[f"macro_{k}"] for k in ("precision", "recall", "f1")], theirs[:3])
    assert "f1" not in found  # of three classes none is the positive one


def test_calibration_error_by_hand():
    # Confidence 0.8 four times, 3 right: |0.75 - 0.8| * 4/5; confidence 0.6 once, wrong: 0.6 / 5.
    probs = np.array([[0.2, 0.8]] * 4 + [[0.4, 0.6]])
    assert calibration_error(probs, np.array([1, 1, 1, 0, 0])) == pytest.approx(0.04 + 0.12)
    assert calibration_error(np.eye(2), np.array([0, 1])) == 0


def test_mcnemar_by_hand():
    ours = np.array([1] * 5 + [0] + [1] * 10, dtype=bool)
    theirs = np.array([0] * 5 + [1] + [1] * 10, dtype=bool)
    # 5 against 1: 2 * (1 + 6) / 64
    assert mcnemar(ours, theirs) == {"only_ours": 5, "only_theirs": 1, "p": pytest.approx(14 / 64)}
    assert mcnemar(ours, ours)["p"] == 1


def test_a_model_differs_from_itself_by_nothing_and_from_a_worse_one_surely():
    labels = np.arange(200) % 2
    worse = np.where(np.arange(200) < 60, 1 - labels, labels)
    values = interaction_scores.resampled_scores(
        {"right": labels, "worse": worse},
        labels,
        num_classes=2,
        metric="accuracy",
        num_resamples=200,
    )
    assert interaction_scores.difference(values["right"], values["right"])["difference"] == 0
    found = interaction_scores.difference(values["right"], values["worse"])
    assert found["difference"] == pytest.approx(0.3)
    assert 0.2 < found["low"] < 0.3 < found["high"] < 0.4
    assert found["p"] == pytest.approx(2 / 201)


def test_categories_are_scored_apart():
    probs = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    found = interaction_scores.by_category(
        probs, np.array([0, 1, 1]), np.array([0, 0, 2]), names=("R", "U", "AS")
    )
    assert {name: (row["n"], row["accuracy"]) for name, row in found.items()} == {
        "R": (2, 0.5),
        "AS": (1, 1.0),
    }
