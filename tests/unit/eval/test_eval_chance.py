import numpy as np
import pytest

from eval.chance import best_chance, chance
from eval.metrics import scores
from mm_moe.batch import IGNORED_LABEL

SINGLE = {"problem_type": "single_label_classification", "num_labels": 4}
MULTI = {"problem_type": "multi_label_classification", "num_labels": 3}


def test_majority_is_the_training_majority_not_the_test_majority():
    labels = np.array([0, 0, 0, 1, IGNORED_LABEL])
    levels = chance(labels, prior=np.array([2, 5, 0, 1]), **SINGLE)
    assert levels["majority"]["accuracy"] == pytest.approx(1 / 4)  # always says 1
    assert levels["uniform"]["accuracy"] == pytest.approx(1 / 4)
    assert levels["majority"]["balanced_accuracy"] == pytest.approx(1 / 2)


def test_uniform_equals_the_mean_of_many_throws():
    rng = np.random.default_rng(0)
    labels = rng.choice(4, size=4000, p=[0.6, 0.2, 0.2, 0])
    thrown = scores(np.eye(4)[rng.integers(0, 4, 4000)], labels, **SINGLE)
    expected = chance(labels, prior=np.ones(4), **SINGLE)["uniform"]
    assert thrown == {name: pytest.approx(value, abs=0.02) for name, value in expected.items()}


def test_uniform_multi_label_equals_the_mean_of_many_throws():
    rng = np.random.default_rng(0)
    labels = (rng.random((6000, 3)) < [0.7, 0.3, 0.5]).astype(float)
    labels[labels.sum(1) == 0, 0] = 1
    thrown = scores(rng.normal(size=labels.shape), labels, **MULTI)
    expected = chance(labels, prior=np.full(3, 0.5), **MULTI)["uniform"]
    for name in ("macro_f1", "micro_f1", "weighted_f1"):
        assert thrown[name] == pytest.approx(expected[name], abs=0.02)


def test_multi_label_majority_says_what_most_samples_have():
    labels = np.array([[1, 0, 0], [1, 1, 0]])
    levels = chance(labels, prior=np.array([0.9, 0.2, 0.1]), **MULTI)
    assert levels["majority"]["micro_f1"] == pytest.approx(2 * 2 / (2 + 3))


def test_regression_guesses_the_training_mean():
    levels = chance(
        np.array([1.0, 3.0]), prior=np.array([2.0]), problem_type="regression", num_labels=1
    )
    assert levels == {"majority": {"mae": pytest.approx(1.0), "corr": 0.0}}


def test_best_chance_knows_the_direction():
    levels = {"majority": {"mae": 2.0, "accuracy": 0.2}, "uniform": {"mae": 1.0, "accuracy": 0.1}}
    assert best_chance(levels, metric="mae") == 1.0
    assert best_chance(levels, metric="accuracy") == 0.2
    assert best_chance({}, metric="accuracy") is None
