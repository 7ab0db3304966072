import json
from types import SimpleNamespace

import numpy as np
import pytest

from eval.patterns import conditions, evaluate_conditions, scores_document
from mm_moe.batch import IGNORED_LABEL
from mm_moe.errors import DataError
from mm_moe.training.predict import Predictions

IDS = [f"row-{index}" for index in range(200)]
LABELS = np.array([index % 2 for index in range(200)])
SOURCE = SimpleNamespace(name="toy", problem_type="single_label_classification", task=None)


def predict(protocols, split):
    return [predict_one(missing, split) for missing in protocols]


def predict_one(missing, split):
    """A model that reads the text: always right with it, always says class 0 without it."""
    assert split == "test"
    if missing is None:
        present = np.ones((len(IDS), 2), dtype=bool)
    else:
        present = missing.present(IDS, ("image", "text")).numpy()
    said = np.where(present[:, 1], LABELS, 0)
    return Predictions(ids=IDS, logits=np.eye(2)[said], labels=LABELS, present=present)


def evaluate(predict=predict, ratio=0.5, prior=(3, 1)):
    return evaluate_conditions(
        predict,
        source=SOURCE,
        modalities=("image", "text"),
        num_labels=2,
        prior=np.array(prior),
        ratio=ratio,
    )


def test_conditions_take_each_modality_wholly_and_then_mix():
    table = conditions(("image", "text", "audio"), dataset="toy", split="test", ratio=0.7)
    assert list(table) == [
        *("complete", "audio missing", "text missing", "image missing"),
        *("text+audio missing", "image+audio missing", "image+text missing"),
        "mixed",
    ]
    assert table["complete"] is None
    assert (table["text missing"].kind, table["text missing"].ratio) == ("text", 1.0)
    assert (table["mixed"].kind, table["mixed"].ratio) == ("any", 0.7)
    two = conditions(("image", "text"), dataset="toy", split="test", ratio=0.7)
    assert list(two) == ["complete", "text missing", "image missing", "mixed"]
    assert two["mixed"].kind == "both"


def test_one_modality_has_nothing_to_lose():
    assert list(conditions(("image",), dataset="toy", split="test", ratio=0.7)) == ["complete"]


def test_without_a_ratio_there_is_no_mixed_condition():
    assert "mixed" not in conditions(("image", "text"), dataset="toy", split="test", ratio=0)


def test_scores_follow_what_is_missing():
    rows = {row.condition: row for row in evaluate()}
    assert rows["complete"].metrics["accuracy"] == 1
    assert rows["image missing"].metrics["accuracy"] == 1
    assert rows["text missing"].metrics["accuracy"] == pytest.approx(
        0.5
    )  # half of the rows are class 0
    # a quarter of the samples lacks the text, half of those are of class 1
    assert rows["mixed"].metrics["accuracy"] == pytest.approx(1 - 0.25 / 2, abs=0.06)
    assert all(row.n == 200 for row in rows.values())
    assert rows["complete"].chance["majority"]["accuracy"] == pytest.approx(0.5)
    low, high = rows["text missing"].interval
    assert low < 0.5 < high


def test_rows_without_a_label_are_not_counted():
    def half_labelled(protocols, split):
        for found in predict(protocols, split):
            labels = np.where(np.arange(200) < 50, found.labels, IGNORED_LABEL)
            yield Predictions(found.ids, found.logits, labels, found.present)

    assert {row.n for row in evaluate(half_labelled)} == {50}


def test_a_split_without_labels_is_named():
    def unlabelled(protocols, split):
        for found in predict(protocols, split):
            labels = np.full(200, IGNORED_LABEL)
            yield Predictions(found.ids, found.logits, labels, found.present)

    with pytest.raises(DataError, match="'test' of 'toy' has no labelled sample"):
        evaluate(unlabelled)


def test_document_holds_every_model_and_survives_json():
    rows = evaluate()
    document = scores_document({"replay": rows, "no prompts": rows}, expert_load={"a": [3, 1]})
    assert json.loads(json.dumps(document)) == document
    assert document["metrics"][0] == "accuracy"
    assert document["models"]["no prompts"]["complete"]["accuracy"] == 1
    assert document["num_rows"] == dict.fromkeys(document["conditions"], 200)
    assert document["expert_load"] == {"a": [3, 1]}
