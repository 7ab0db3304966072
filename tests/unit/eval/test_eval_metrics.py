import numpy as np
import pytest
import torch
from torchmetrics.functional import classification, mean_absolute_error, pearson_corrcoef

from eval.metrics import headline, interval, scores
from mm_moe.batch import IGNORED_LABEL
from mm_moe.errors import ConfigError, DataError

SINGLE = {"problem_type": "single_label_classification", "num_labels": 3}
MULTI = {"problem_type": "multi_label_classification", "num_labels": 2}
VALUE = {"problem_type": "regression", "num_labels": 1}


def one_hot(classes, num_labels=3):
    return np.eye(num_labels)[classes]


def test_single_label_by_hand():
    # classes:    0 right 2 of 3, 1 right 1 of 1, 2 never occurs but is predicted once
    labels, predicted = np.array([0, 0, 0, 1]), [0, 0, 2, 1]
    found = scores(one_hot(predicted), labels, **SINGLE)
    assert found["accuracy"] == pytest.approx(3 / 4)
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    # F1 of 0: precision 1, recall 2/3 -> .8; of 1: 1; class 2 has no label and is no term
    assert found["macro_f1"] == pytest.approx((0.8 + 1) / 2)


def test_ignored_rows_take_no_part():
    labels = np.array([0, 1, IGNORED_LABEL, IGNORED_LABEL])
    found = scores(one_hot([0, 1, 0, 1]), labels, **SINGLE)
    assert found == dict.fromkeys(("accuracy", "balanced_accuracy", "macro_f1", "weighted_f1"), 1)


def test_a_prediction_of_the_wrong_class_can_be_the_ignored_value_of_no_row():
    assert scores(one_hot([2, 2]), np.array([0, 1]), **SINGLE)["accuracy"] == 0


def test_multi_label_by_hand():
    labels = np.array([[1, 0], [1, 1], [0, 0]], dtype=np.float32)
    logits = np.array([[3.0, -1], [-2, 1], [-1, -1]])
    found = scores(logits, labels, **MULTI)
    # label 0: tp 1, fn 1 -> 2/3; label 1: tp 1 -> 1
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["micro_f1"] == pytest.approx(2 * 2 / (2 + 3))  # 2 tp, 2 predicted, 3 actual
    assert found["samples_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)  # the empty row counts 0
    assert found["weighted_f1"] == pytest.approx((2 * 2 / 3 + 1 * 1) / 3)


def test_regression_by_hand():
    labels = np.array([1.0, 2, 3, IGNORED_LABEL])
    found = scores(np.array([[2.0], [3], [4], [999]]), labels, **VALUE)
    assert found == {"mae": pytest.approx(1), "corr": pytest.approx(1)}


def test_correlation_with_a_constant_is_zero_and_json():
    assert scores(np.zeros(3), np.array([1.0, 2, 3]), **VALUE)["corr"] == 0


def test_agrees_with_torchmetrics():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 3)), rng.integers(0, 3, 200)
    peer = {"preds": torch.tensor(logits), "target": torch.tensor(labels), "num_classes": 3}
    found = scores(logits, labels, **SINGLE)
    assert found["accuracy"] == pytest.approx(
        classification.multiclass_accuracy(**peer, average="micro").item()
    )
    assert found["balanced_accuracy"] == pytest.approx(
        classification.multiclass_accuracy(**peer, average="macro").item()
    )
    assert found["macro_f1"] == pytest.approx(
        classification.multiclass_f1_score(**peer, average="macro").item()
    )


def test_multi_label_agrees_with_torchmetrics():
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(100, 2)), rng.integers(0, 2, (100, 2))
    peer = {"preds": torch.tensor(logits).sigmoid(), "target": torch.tensor(labels)}
    for average in ("macro", "micro", "weighted"):
        expected = classification.multilabel_f1_score(**peer, num_labels=2, average=average)
        assert scores(logits, labels, **MULTI)[f"{average}_f1"] == pytest.approx(expected.item())


def test_regression_agrees_with_torchmetrics():
    rng = np.random.default_rng(2)
    values, labels = rng.normal(size=50), rng.normal(size=50)
    found = scores(values, labels, **VALUE)
    pair = torch.tensor(values), torch.tensor(labels)
    assert found["mae"] == pytest.approx(mean_absolute_error(*pair).item(), rel=1e-5)
    assert found["corr"] == pytest.approx(pearson_corrcoef(*pair).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "words"),
    [
        (np.zeros((2, 3)), np.full(2, IGNORED_LABEL), DataError, "none of the 2 rows"),
        (np.zeros((2, 4)), np.zeros(2), DataError, "3 outputs of 2 rows"),
        (np.full((2, 3), np.nan), np.zeros(2), DataError, "2 of 2 rows are not finite"),
    ],
)
def test_refuses_what_cannot_be_scored(logits, labels, error, words):
    with pytest.raises(error, match=words):
        scores(logits, labels, **SINGLE)


def test_unknown_problem_type_names_the_nearest():
    with pytest.raises(ConfigError, match="single_label_classification"):
        headline("single_label_clasification")


def test_interval_covers_the_value_and_shrinks_with_the_samples():
    rng = np.random.default_rng(0)
    widths = []
    for count in (50, 800):
        labels = rng.integers(0, 3, count)
        predicted = np.where(rng.random(count) < 0.7, labels, (labels + 1) % 3)
        low, high = interval(one_hot(predicted), labels, metric="accuracy", **SINGLE)
        assert low < (predicted == labels).mean() < high
        widths.append(high - low)
    # standard error sqrt(.7 * .3 / n), 95% is 3.92 of it wide: .254 and .0635
    assert widths == [pytest.approx(0.254, rel=0.25), pytest.approx(0.0635, rel=0.25)]


def test_interval_is_a_function_of_its_seed():
    arguments = (one_hot([0, 1, 2, 0]), np.array([0, 1, 1, 0]))
    first = interval(*arguments, metric="accuracy", seed=3, **SINGLE)
    assert first == interval(*arguments, metric="accuracy", seed=3, **SINGLE)


def test_pairs_of_equal_rows_give_the_interval_of_half_as_many():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    predicted = np.where(rng.random(200) < 0.7, labels, (labels + 1) % 3)
    single = interval(one_hot(predicted), labels, metric="accuracy", **SINGLE)
    twice, groups = np.repeat(predicted, 2), np.repeat(np.arange(200), 2)
    labels = np.where(groups == 7, IGNORED_LABEL, np.repeat(labels, 2))  # takes no part
    arguments = (one_hot(twice), labels)
    pairs = interval(*arguments, groups=groups, metric="accuracy", **SINGLE)
    apart = interval(*arguments, metric="accuracy", **SINGLE)
    assert pairs == pytest.approx(single, abs=0.01)
    assert (apart[1] - apart[0]) / (pairs[1] - pairs[0]) == pytest.approx(0.5**0.5, rel=0.1)
