import json

import numpy as np
import pytest

from eval import ood, operating
from eval.predictions import PredictionFile
from mm_moe.errors import DataError


@pytest.mark.parametrize(("count", "missed"), [(5, 0), (10, 0), (11, 1), (20, 1), (21, 2), (70, 6)])
def test_fewer_than_a_tenth_of_the_positives_are_missed(count, missed):
    scores = np.arange(100.0)
    labels = np.zeros(100)
    labels[-count:] = 1  # the highest scores
    cut = operating.threshold(labels, scores)
    assert (scores[-count:] < cut).sum() == missed


def test_scores_at_a_threshold_by_hand():
    labels = np.array([1, 1, 1, 0, 0])
    found = operating.at_threshold(labels, np.array([0.9, 0.5, 0.1, 0.5, 0.2]), 0.5)
    assert found["sensitivity"] == pytest.approx(2 / 3)  # a score at the cut is positive
    assert found["specificity"] == pytest.approx(1 / 2)
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_the_validation_split_sets_the_threshold_of_a_run(tmp_path, capsys):
    def save(split, labels, logits):
        count = len(labels)
        ids = np.array([f"{n:032d}" for n in range(count)])
        arrays = {"complete": np.array(labels, float)}, {"complete": np.array(logits, np.float32)}
        PredictionFile(ids, ids, *arrays).save(tmp_path / f"predictions-{split}.npz")

    save("validation", [[1, 0], [0, 0], [-100, -100]], [[2.0, 0], [1, 0], [-9, 0]])
    save("test", [[1, 1], [1, 0], [0, 0]], [[3.0, 0], [1, 0], [0, 0]])
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").write_text(json.dumps({"label_names": ["tear", "rare"]}))
    assert operating.main([str(tmp_path)]) == 0
    found = json.loads((tmp_path / "operating.json").read_text())["complete"]
    assert list(found) == ["tear"]  # no validation row has the other
    assert found["tear"] == {
        "threshold": 2.0,
        "sensitivity": 0.5,
        "specificity": 1.0,
        "balanced_accuracy": 0.75,
    }
    assert "tear" in capsys.readouterr().out


def test_the_mean_of_nine_sets(tmp_path, capsys):
    names = [name for names in ood.SETS.values() for name in names]
    assert len(set(names)) == 9
    scores = {name: n / 10 for n, name in enumerate(names)} | {"test": 0.7}
    found = ood.ood_means(scores)
    assert found["mean of nine"] == pytest.approx(0.4)  # 0 to 0.8
    assert found["image"] == pytest.approx(0.45)
    assert found["in distribution"] == 0.7
    for name, score in scores.items():
        document = {
            "metrics": ["vqa_score"],
            "models": {"none": {"complete": {"vqa_score": score}}},
        }
        (tmp_path / f"evaluation-{name}.json").write_text(json.dumps(document))
    assert ood.main([str(tmp_path)]) == 0
    assert "mean of nine       40.00" in capsys.readouterr().out
    (tmp_path / "evaluation-ood_ko.json").unlink()
    with pytest.raises(DataError, match="no score of ood_ko;"):
        ood.score_run(tmp_path)
    assert ood.main([str(tmp_path)]) == 2
