"""The paper's filter and balance on numbers that can be followed, and thresholds from train."""

import numpy as np
import pytest

from mm_moe.data.interactions.categories import NONE
from mm_moe.data.interactions.hard_labels import (
    SENTINEL,
    Calibration,
    UniScores,
    balanced,
    calibrate,
    confidence_gap,
    hard_labels,
)
from mm_moe.errors import ConfigError


def scores(no, yes):
    rows = np.stack([np.array(no, dtype=float), np.array(yes, dtype=float)], axis=-1)
    return UniScores(tuple(map(str, range(len(rows)))), "image", rows)


def test_gaps_of_the_two_modalities():
    both = scores([0.2, 0.4], [0.6, 0.44]).score_NC
    assert confidence_gap(both, kind="ratio") == pytest.approx([0.5, 1 / 21])
    assert confidence_gap(both, kind="difference") == pytest.approx([0.4, 0.04])
    with pytest.raises(ConfigError, match="'sum' is unknown"):
        confidence_gap(both, kind="sum")


def test_the_filter_drops_training_rows_only():
    found = scores([0.2, 0.40, 0.6], [0.6, 0.44, 0.2])
    options = {"gap": "ratio", "min_gap": 0.1, "balance": 0.0}
    assert hard_labels(found, split="train", **options).tolist() == [1, NONE, 0]
    assert hard_labels(found, split="test", **options).tolist() == [1, 1, 0]
    everything = hard_labels(found, split="train", min_gap=None, balance=0.0)
    assert everything.tolist() == [1, 1, 0]
    assert hard_labels(scores([0.5], [0.5]), split="test").tolist() == [0]  # a tie is a no


def test_balance_relabels_by_the_score_of_yes():
    yes = np.array([0.9, 0.6, 0.7, 0.8, 0.95])
    ones = np.ones(5, dtype=np.int64)
    # 5 of 5 say yes; at most floor(0.8 x 5) = 4 may: the lowest, 0.6, becomes no
    assert balanced(ones, yes_N=yes, bound=0.2).tolist() == [1, 0, 1, 1, 1]
    assert balanced(ones * 0, yes_N=yes, bound=0.4).tolist() == [1, 0, 0, 0, 1]
    assert balanced(ones, yes_N=yes, bound=0.0).tolist() == [1] * 5
    assert balanced(ones, yes_N=np.ones(5), bound=0.2).tolist() == [1, 1, 1, 1, 0]


def test_as_many_yes_as_in_the_released_training_file():
    found = scores(np.full(251, 0.1), np.linspace(0.5, 0.9, 251))
    assert hard_labels(found, split="train").sum() == 200  # floor(0.8 x 251)
    assert hard_labels(found, split="validation").sum() == 251


def test_sentinels_pass_the_papers_filter_and_count_as_nothing_here():
    found = scores([SENTINEL, SENTINEL, 0.3], [0.02, SENTINEL, 0.7])
    paper = hard_labels(found, split="train", gap="difference", balance=0.0)
    assert paper.tolist() == [1, NONE, 1]
    assert found.missing_N.tolist() == [False, True, False]
    assert found.probability_NC[0].tolist() == [0.0, 1.0]
    assert np.isnan(found.probability_NC[1]).all()
    assert Calibration().labels(found).tolist() == [1, NONE, 1]


def test_a_threshold_from_train_holds_on_the_other_splits():
    train = scores([0.4, 0.3, 0.2, 0.1, 0.05], [0.6, 0.7, 0.8, 0.9, 0.95])
    rule = calibrate(train, balance=0.4)
    assert rule.threshold == pytest.approx(0.75)  # floor(0.6 x 5) = 3 may say yes
    assert rule.labels(train).tolist() == [0, 0, 1, 1, 1]
    assert rule.labels(scores([0.28, 0.2], [0.72, 0.8])).tolist() == [0, 1]
    assert calibrate(scores([0.6, 0.2], [0.4, 0.8]), balance=0.2).threshold == 0.5
    assert calibrate(train).threshold is None


def test_a_gap_leaves_rows_without_prediction():
    found = UniScores(("a", "b"), "text", np.array([[0.5, 0.4, 0.1], [0.1, 0.2, 0.7]]))
    assert Calibration(min_gap=0.2).labels(found).tolist() == [NONE, 2]
    assert Calibration().labels(found).tolist() == [0, 2]
    with pytest.raises(ConfigError, match="two classes, 'text' has scores for 3"):
        hard_labels(found, split="train")
    with pytest.raises(ConfigError, match=r"balance \(0.7\)"):
        calibrate(scores([0.1], [0.9]), balance=0.7)
