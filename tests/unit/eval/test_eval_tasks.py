import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torchmetrics.functional import classification

from eval.chance import chance
from eval.metrics import METRICS, headline, interval, scores
from eval.sentiment import sims_bins
from mm_moe.batch import IGNORED_LABEL
from mm_moe.data.schema import TASKS
from mm_moe.errors import ConfigError

BINARY = {"problem_type": "single_label_classification", "num_labels": 2, "task": "binary"}
MULTI = {"problem_type": "multi_label_classification", "num_labels": 3}
VALUE = {"problem_type": "regression", "num_labels": 1}


def test_binary_by_hand():
    labels = np.array([0, 1, 0, 1])
    # differences of the two logits: 0.1, 0.9, 0.4, -0.2 ; pairs of (1, 0):
    # 0.9 beats 0.1 and 0.4, -0.2 beats none: 2 of 4
    logits = np.array([[0, 0.1], [-0.9, 0], [5, 5.4], [0.2, 0]])
    found = scores(logits, labels, **BINARY)
    assert found["auroc"] == pytest.approx(2 / 4)
    # ranked 1 0 0 1: precision 1/1 at the first, 2/4 at the second
    assert found["auprc"] == pytest.approx((1 + 2 / 4) / 2)
    assert found["accuracy"] == pytest.approx(1 / 4)
    assert headline("binary") == "auroc"


def test_binary_agrees_with_a_softmax_over_two_classes():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(300, 2)), rng.integers(0, 2, 300)
    found = scores(logits, labels, **BINARY)
    probability = torch.tensor(logits).softmax(-1)
    peer = classification.multiclass_auroc(
        probability, torch.tensor(labels), num_classes=2, average="macro"
    )
    assert found["auroc"] == pytest.approx(peer.item())
    assert found["auprc"] == pytest.approx(sk.average_precision_score(labels, probability[:, 1]))
    low, high = interval(logits, labels, metric="auroc", num_resamples=100, **BINARY)
    assert low < found["auroc"] < high


def test_one_class_alone_has_no_curve():
    assert scores(np.zeros((3, 2)), np.zeros(3), **BINARY)["auroc"] == 0.5


def test_mean_average_precision_by_hand():
    labels = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]])
    logits = np.array([[3.0, 2, 9], [2, 1, 9], [1, 0, 9]])
    # label 0: ranks 1 and 3 -> (1 + 2/3) / 2; label 1: ranks 2 and 3 -> (1/2 + 2/3) / 2; 2: nobody
    expected = ((1 + 2 / 3) / 2 + (1 / 2 + 2 / 3) / 2) / 2
    found = scores(logits, labels, **MULTI)
    assert found["map"] == pytest.approx(expected)
    # F1: 0: tp 2, fp 1 -> 4/5; 1: tp 1 (the logit 0 is no), fp 1, fn 1 -> 1/2; 2: fp only -> 0
    assert found["macro_f1"] == pytest.approx((0.8 + 0.5 + 0) / 3)


def test_mosi_by_hand():
    labels = np.array([-3.0, -0.6, 0.0, 0.4, 2.6])
    values = np.array([-3.4, 0.2, -0.1, 0.9, 1.9])
    found = scores(values, labels, task="sentiment_mosi", **VALUE)
    assert found["mae"] == pytest.approx((0.4 + 0.8 + 0.1 + 0.5 + 0.7) / 5)
    assert found["corr"] == pytest.approx(np.corrcoef(labels, values)[0, 1])
    # rounded within 3: -3 -1 0 0 3 against -3 0 0 1 2
    assert found["acc7"] == pytest.approx(2 / 5)
    # within 2: -2 -1 0 0 2 against -2 0 0 1 2
    assert found["acc5"] == pytest.approx(3 / 5)
    # without the zero: - - + + against - + + +
    assert found["acc2"] == pytest.approx(3 / 4)
    # negative: tp 1, fn 1 -> 2/3; positive: tp 2, fp 1 -> 4/5; two labels each
    assert found["f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    # with zero as not negative: - - + + + against - + - + +
    assert found["acc2_with_zero"] == pytest.approx(3 / 5)


def test_mosi_f1_weighs_by_the_labels_not_the_predictions():
    labels, values = np.array([-1.0, 1, 1, 1]), np.array([-1.0, -1, -1, 1])
    found = scores(values, labels, task="sentiment_mosi", **VALUE)
    # negative: tp 1, fp 2 -> 1/2; positive: tp 1, fn 2 -> 1/2
    assert found["f1"] == pytest.approx(sk.f1_score(labels > 0, values > 0, average="weighted"))
    labels, values = np.array([-1.0, -1, 1, 1]), np.array([-1.0, 1, 1, 1])
    # negative 2/3, positive 4/5, halves; swapped it would be (2/3 * 1 + 4/5 * 3) / 4
    found = scores(values, labels, task="sentiment_mosi", **VALUE)
    assert found["f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)


def test_only_neutral_labels_leave_nothing_to_decide():
    found = scores(np.ones(2), np.zeros(2), task="sentiment_mosi", **VALUE)
    assert (found["acc2"], found["f1"]) == (0, 0)


def test_sims_by_hand():
    labels = np.array([-1.0, -0.2, 0.0, 0.6, 0.8], dtype=np.float32)
    values = np.array([-1.7, -0.8, 0.05, 0.3, 0.0], dtype=np.float32)
    found = scores(values, labels, task="sentiment_sims", **VALUE)
    # five bins: 0 1 2 3 4 against 0 0 2 3 2
    assert found["acc5"] == pytest.approx(3 / 5)
    # three bins: 0 0 1 2 2 against 0 0 1 2 1
    assert found["acc3"] == pytest.approx(4 / 5)
    # zero is negative: - - - + + against - - + + -
    assert found["acc2"] == pytest.approx(3 / 5)
    # negative: tp 2, fn 1, fp 1 -> 2/3 (of 3 labels); positive: tp 1, fn 1, fp 1 -> 1/2 (of 2)
    assert found["f1"] == pytest.approx((2 / 3 * 3 + 1 / 2 * 2) / 5)


def test_sims_edges_belong_to_the_lower_bin_in_float32_too():
    edges = np.array([-1, -0.7, -0.1, 0, 0.1, 0.7, 1], dtype=np.float32)
    assert sims_bins(edges, bins=5).tolist() == [0, 0, 1, 2, 2, 3, 4]
    assert sims_bins(edges, bins=2).tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_weighted_f1_agrees_with_scikit_learn():
    rng = np.random.default_rng(1)
    labels, predicted = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    found = scores(
        np.eye(4)[predicted], labels, problem_type="single_label_classification", num_labels=4
    )
    assert found["weighted_f1"] == pytest.approx(sk.f1_score(labels, predicted, average="weighted"))


@pytest.mark.parametrize("task", sorted(METRICS))
def test_chance_knows_every_metric_of_every_task(task):
    kind = TASKS[task]
    rng = np.random.default_rng(2)
    count = 4 if task == "knee_findings" else 1 if kind in ("regression", "survival") else 2
    wide = {"multi_label_classification": (count,), "survival": (2,)}.get(kind, ())
    labels = rng.integers(0, 2, (400, *wide))
    prior = np.full(count, 0.6)
    levels = chance(labels, prior=prior, problem_type=kind, num_labels=count, task=task)
    for level in levels.values():
        assert set(level) == set(METRICS[task])
        assert all(0 <= value <= 1 for value in level.values())
    assert set(levels) == ({"majority"} if kind == "regression" else {"majority", "uniform"})


def test_uniform_ranking_equals_the_mean_of_many_throws():
    rng = np.random.default_rng(3)
    labels = (rng.random(5000) < 0.3).astype(int)
    expected = chance(labels, prior=np.array([7, 3]), **BINARY)["uniform"]
    thrown = scores(rng.normal(size=(5000, 2)), labels, **BINARY)
    assert thrown == {name: pytest.approx(value, abs=0.03) for name, value in expected.items()}


def test_a_task_that_does_not_fit_the_data():
    with pytest.raises(ConfigError, match=r"'binary' needs two classes, the data have 3"):
        scores(np.zeros((1, 3)), np.zeros(1), **{**BINARY, "num_labels": 3})
    with pytest.raises(ConfigError, match=r"'sentiment_sims' scores regression models"):
        scores(np.zeros((1, 2)), np.zeros(1), **{**BINARY, "task": "sentiment_sims"})
    with pytest.raises(ConfigError, match="sentiment_mosi"):
        headline("sentiment_mosei")


def test_vqa_takes_the_share_of_the_highest_answer():
    labels = np.array([[0.3, 1.0, 0], [0.6, 0, 0.9], [0, 0, 0], [IGNORED_LABEL] * 3])
    logits = np.array([[2.0, 1, 0], [-3, -2, -1], [1, 0, 0], [0, 0, 0]])
    kind = {**MULTI, "task": "vqa"}
    assert scores(logits, labels, **kind) == {"vqa_score": pytest.approx((0.3 + 0.9 + 0) / 3)}
    low, high = interval(logits, labels, metric="vqa_score", num_resamples=50, **kind)
    assert 0 <= low < 0.4 < high <= 0.9
    levels = chance(labels, prior=np.array([0.1, 0.4, 0.2]), **kind)  # always answer 1
    assert levels["majority"]["vqa_score"] == pytest.approx(1 / 3)
    assert levels["uniform"]["vqa_score"] == pytest.approx((1.3 + 1.5) / 9)


def test_knee_findings_by_label():
    labels = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 1], [0, 0, 0, 1]])
    logits = np.array([[3.0, 1, 0, 9], [1, 2, 0, 9], [2, 0, 0, 9], [0, 3, 0, 9]])
    kind = {**MULTI, "num_labels": 4, "task": "knee_findings"}
    found = scores(logits, labels, **kind)
    # abnormal: 3, 2 beat 1, 0; mtear: 2 beats 1 but not 3, 0 none; acl: nobody; cartilage: ties
    expected = {"abnormal": 1.0, "mtear": 1 / 4, "acl": 0.5, "cartilage": 0.5}
    assert found == {
        "mean_auroc": pytest.approx((1 + 1 / 4 + 1 / 2) / 3),
        **{f"auroc_{name}": pytest.approx(value) for name, value in expected.items()},
    }
    assert chance(labels, prior=labels.mean(0), **kind)["uniform"]["mean_auroc"] == 0.5


def test_rare_codes_are_headed_by_their_average_precision():
    assert headline("binary_auprc") == "auprc"
    labels = np.array([0, 1, 0, 1])
    logits = np.array([[0, 0.1], [-0.9, 0], [5, 5.4], [0.2, 0]])  # ranked 1 0 0 1
    found = scores(logits, labels, **{**BINARY, "task": "binary_auprc"})
    assert found["auprc"] == pytest.approx((1 + 2 / 4) / 2)
    assert found["accuracy"] == pytest.approx(1 / 4)
