"""Clinical scores against torchmetrics, scikit-learn and counts by hand."""

import numpy as np
import pytest
import torch
from pytest import approx  # noqa: PT013
from scipy.special import softmax
from sklearn import metrics as sk

from eval import clinical
from eval.chance import best_chance, chance
from eval.metrics import headline, interval, scores

ROWS = 200


def predictions(num_labels, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_labels, size=ROWS)
    logits = rng.normal(size=(ROWS, num_labels)) + 1.5 * np.eye(num_labels)[labels]
    return logits, labels


def scored(logits, labels, task):
    kind = {"problem_type": "single_label_classification", "num_labels": logits.shape[1]}
    return scores(logits, labels, task=task, **kind)


def test_binary_scores_equal_their_peers():
    from torchmetrics.classification import BinaryCalibrationError

    logits, labels = predictions(2)
    found = scored(logits, labels, "clinical_binary")
    positive = softmax(logits, axis=1)[:, 1]
    peer = BinaryCalibrationError(n_bins=15, norm="l1")
    assert found["ece"] == approx(peer(torch.tensor(positive), torch.tensor(labels)).item())
    assert found["brier"] == approx(sk.brier_score_loss(labels, positive))
    assert found["auroc"] == approx(sk.roc_auc_score(labels, positive))
    assert found["auprc"] == approx(sk.average_precision_score(labels, positive))
    assert found["macro_f1"] == approx(sk.f1_score(labels, positive > 0.5, average="macro"))
    assert found["accuracy"] == approx((labels == (positive > 0.5)).mean())


def test_scores_of_classes_equal_their_peers():
    from torchmetrics.classification import MulticlassCalibrationError

    logits, labels = predictions(4)
    found = scored(logits, labels, "clinical_classes")
    prob = softmax(logits, axis=1)
    peer = MulticlassCalibrationError(4, n_bins=15, norm="l1")
    assert found["ece"] == approx(peer(torch.tensor(prob), torch.tensor(labels)).item())
    assert found["auroc_ovr"] == approx(sk.roc_auc_score(labels, prob, multi_class="ovr"))
    assert found["macro_f1"] == approx(sk.f1_score(labels, logits.argmax(1), average="macro"))


def test_calibration_by_hand():
    # bin (0.6, 0.667]: mean 0.65, half of them hit; bin (0.933, 1]: 1.0, hit
    error = clinical.calibration_error(np.array([0.65, 0.65, 1.0]), np.array([1, 0, 1]))
    assert error == approx(2 / 3 * 0.15)


def test_chance_levels():
    labels = np.array([0, 0, 0, 1])
    kind = {"problem_type": "single_label_classification", "num_labels": 2}
    levels = chance(labels, prior=np.array([75, 25]), task="clinical_binary", **kind)
    assert levels["uniform"]["auprc"] == levels["majority"]["auprc"] == 0.25
    assert levels["uniform"]["auroc"] == levels["majority"]["auroc"] == 0.5
    assert levels["majority"]["brier"] == approx(0.25 * 0.75)  # of the training share
    assert levels["majority"]["ece"] == approx(0.0)
    assert levels["uniform"]["ece"] == approx(0.25)
    assert best_chance(levels, metric="brier") == approx(0.1875)
    kind["num_labels"] = 3
    levels = chance(labels, prior=np.array([3, 1, 0]), task="clinical_classes", **kind)
    assert levels["majority"]["auroc_ovr"] == levels["uniform"]["auroc_ovr"] == 0.5


SURVIVAL = {"problem_type": "survival", "num_labels": 1}


def test_concordance_by_hand():
    pytest.importorskip("sksurv", reason="needs scikit-survival")
    labels = np.array([[1.0, 1], [2, 0], [3, 1], [4, 1]])
    # pairs that can be compared: 1 before 2, 3 and 4; 3 before 4
    risk = np.array([[3.0], [9.0], [2.0], [2.5]])  # right: 1-3, 1-4
    found = scores(risk, labels, **SURVIVAL)
    assert headline("survival") == "c_index"
    assert found["c_index"] == approx(2 / 4)
    # the row that was censored at 2 leaves 2 of 3: the pair 3-4 counts (3 / 2)^2 times
    assert found["c_index_ipcw"] == approx(2 / (3 + 2.25))
    assert scores(labels[:, :1] * -1.0, labels, **SURVIVAL)["c_index"] == 1.0


def test_survival_at_its_edges():
    pytest.importorskip("sksurv", reason="needs scikit-survival")
    labels = np.array([[1.0, 0], [2, 0], [2, 1]])
    assert scores(np.zeros((3, 1)), labels, **SURVIVAL) == {"c_index": 0.5, "c_index_ipcw": 0.5}
    levels = chance(np.array([[1.0, 1], [2, 0]]), prior=np.array([1.5, 0.5]), **SURVIVAL)
    assert levels["majority"]["c_index"] == levels["uniform"]["c_index"] == 0.5
    rng = np.random.default_rng(1)
    labels = np.stack([rng.exponential(size=60), rng.integers(2, size=60)], 1)
    risk = -np.log(labels[:, :1]) + rng.normal(size=(60, 1))
    for metric, value in scores(risk, labels, **SURVIVAL).items():
        low, high = interval(risk, labels, metric=metric, num_resamples=20, **SURVIVAL)
        assert 0.5 < low < value < high <= 1
