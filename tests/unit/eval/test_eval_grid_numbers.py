"""Paired bootstrap, predictions as files, and the published numbers."""

import json

import numpy as np
import pytest
from sklearn.metrics import f1_score

from eval.grid_report import PUBLISHED, beside_ours, published_for
from eval.metrics import resampled
from eval.patterns import chosen_conditions, parse_pattern, pattern_name
from eval.predictions import PredictionFile
from eval.resamples import draw_groups, interval_of, over_seeds
from mm_moe.batch import IGNORED_LABEL
from mm_moe.errors import ConfigError, DataError
from mm_moe.training.predict import Predictions


def test_interval_by_hand():
    # ten resamples 0.1 ... 1.0, none below zero: p = 2 * (0 + 1) / (10 + 1)
    found = interval_of(np.array([0.5, *np.arange(1, 11) / 10]))
    assert found["difference"] == 0.5
    assert found["p"] == pytest.approx(2 / 11)
    assert found["low"] == pytest.approx(0.1 + 0.025 * 0.9)
    assert interval_of(np.zeros(5))["p"] == 1  # equal models differ by nothing


def test_interval_over_seeds_by_hand():
    # mean 2, standard error 1 / sqrt(3), and 4.303 of it on either side with two degrees of freedom
    assert over_seeds([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.484, 2 + 2.484), abs=1e-3)
    assert over_seeds([0.5, 0.5]) == (0.5, 0.5)
    assert over_seeds([0.5]) is None


def test_resampled_metrics_are_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(30, 4))
    labels = generator.integers(0, 2, (30, 4)).astype(float)
    labels[:, 3] = 0
    labels[5] = IGNORED_LABEL  # takes part in no resample
    rows = list(draw_groups(np.arange(30), num_resamples=3, seed=1))
    found = resampled(
        logits,
        labels,
        rows=rows,
        metric="macro_f1",
        problem_type="multi_label_classification",
        num_labels=4,
    )
    for value, drawn in zip(found, [np.arange(30), *rows], strict=True):
        kept = drawn[drawn != 5]
        expected = f1_score(labels[kept], logits[kept] > 0, average="macro", zero_division=0)
        assert value == pytest.approx(expected)


def test_accuracy_of_resamples_by_hand():
    logits, labels = np.eye(2)[[0, 1, 1]], np.array([0, 1, 0])
    rows = [np.array([0, 1, 1]), np.array([2, 2, 0])]
    found = resampled(
        logits,
        labels,
        rows=rows,
        metric="accuracy",
        problem_type="single_label_classification",
        num_labels=2,
    )
    assert found == pytest.approx([2 / 3, 1, 1 / 3])


def test_groups_are_drawn_whole():
    groups = np.array(["b", "a", "b", "c"])
    for rows in draw_groups(groups, num_resamples=20, seed=0):
        assert list(rows).count(0) == list(rows).count(2)
    alone = list(draw_groups(np.array(["x", "y"]), num_resamples=50, seed=0))
    assert {tuple(rows) for rows in alone} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    again = list(draw_groups(np.array(["x", "y"]), num_resamples=50, seed=0))
    assert np.array_equal(alone, again)


def test_predictions_survive_the_disk_without_their_ids(tmp_path):
    found = Predictions(["patient-7", "patient-9"], np.eye(2), np.array([0, 1]), np.ones((2, 2)))
    group_of = {"patient-7": "house-1", "patient-9": "house-1"}
    file = PredictionFile.of({"complete": found}, group_of=group_of, dataset="toy")
    file.save(tmp_path / "predictions.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.npz"]
    again = PredictionFile.load(tmp_path / "predictions.npz")
    assert np.array_equal(again.logits["complete"], np.eye(2))
    assert np.array_equal(again.labels["complete"], [0, 1])
    assert len(set(again.ids)) == 2
    assert len(set(again.groups)) == 1
    assert not any("patient" in text for text in again.ids)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "predictions.npz").read_bytes()[:200])
    for name in ("cut.npz", "absent.npz"):
        with pytest.raises(DataError, match="holds no predictions"):
            PredictionFile.load(tmp_path / name)


def test_a_pattern_has_one_name():
    texts = ("complete", "none", "text:0", "both:0.70", "audio+text:1")
    names = [pattern_name(*parse_pattern(text)) for text in texts]
    assert names == ["complete", "complete", "complete", "both:0.7", "audio+text:1"]
    table = chosen_conditions(
        ["none", "text:1"], modalities=("image", "text"), dataset="d", split="test", seed=4
    )
    assert table["complete"] is None
    assert (table["text:1"].kind, table["text:1"].ratio, table["text:1"].seed) == ("text", 1.0, 4)
    with pytest.raises(ConfigError, match="unknown missing kind"):
        chosen_conditions(["audio:1"], modalities=("image", "text"), dataset="d", split="test")


def test_published_gains_are_those_of_the_paper_notes():
    tables = json.loads(PUBLISHED.read_text())["tables"]
    rep = next(table for table in tables if table["id"] == "rep_table1")
    gains = {
        name: np.mean([row["values"]["REP"] - row["values"]["DCP"] for row in of["rows"]])
        for name, of in rep["datasets"].items()
    }
    expected = {"mm_imdb": 1.53, "food101": 0.83, "hateful_memes": 2.64}
    assert gains == pytest.approx(expected, abs=0.006)
    for of in rep["datasets"].values():
        assert len(of["rows"]) == 9
        for row in of["rows"]:  # the pattern says what the published shares say
            kind, ratio = parse_pattern(row["test"])
            lack = 200 - row["image_present_percent"] - row["text_present_percent"]
            assert lack == pytest.approx(100 * ratio)
            assert kind == "both" or row[f"{kind}_present_percent"] == pytest.approx(
                100 * (1 - ratio)
            )


def test_published_numbers_stand_beside_ours_for_the_same_data_and_pattern_only():
    assert published_for({"name": "emoji"}, metric="accuracy") == []
    assert published_for({"name": "mm_imdb"}, metric="accuracy") == []
    rep, dcp = published_for({"name": "mm_imdb"}, metric="macro_f1")
    assert rep["caveats"]
    row = {"method": "replay", "metric": "macro_f1", "mean": 0.5, "std": 0.01}
    rows = [row | {"train": "both:0.7", "test": test} for test in ("both:0.7", "text:0.7")]
    header, *lines = beside_ours(rep, rows)
    assert header[-2:] == ["REP", "replay (here)"]
    assert {tuple(line[:2]): line[-1] for line in lines if line[-1] != "-"} == {
        ("both:0.7", "both:0.7"): "50.0 ± 1.0"
    }
    assert len(beside_ours(dcp, rows)) == 1 + 21
