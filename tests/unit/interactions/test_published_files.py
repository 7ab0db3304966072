"""Published files: what is read back, and what is refused with file, line, key and rule."""

import json

import numpy as np
import pytest

from mm_moe.data.interactions import published
from mm_moe.errors import DataError
from tests.raw_layouts import put


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def test_labels_go_through_both_forms(tmp_path):
    record = {"logits": {"Yes": 0.7, "No": 0.2}, "gth": True, "pred": 1}
    older = record | {"logits": {"No": -10000, "Yes": 0.1}, "gth": 0, "should_include_in_train": 1}
    whole = put(tmp_path / "a.json", json.dumps({"2_484": record, "12": older}))
    found = published.read_labels(whole)
    assert found.ids == ("2_484", "12")
    assert found.score_N2.tolist() == [[0.2, 0.7], [-10000, 0.1]]
    assert (found.gold_N.tolist(), found.prediction_N.tolist()) == ([1, 0], [1, 1])
    published.write_labels(tmp_path / "b.json", found)
    again = published.read_labels(tmp_path / "b.json")
    assert again.score_N2.tolist() == found.score_N2.tolist()
    stream = put(tmp_path / "a.jsonl", lines({"image_id": 7} | record))
    assert published.read_labels(stream).ids == ("7",)


def test_expert_lines_with_what_models_add(tmp_path):
    path = put(
        tmp_path / "e.jsonl",
        lines(
            {"image_id": "a", "logits": [0.1, 0.9], "target": 1, "text": "t", "pred": 1},
            {"image_id": 5, "logits": [2, -1], "target": False},
            {"image_id": "a", "logits": [0.1, 0.9], "target": 1.0},
            {"image_id": "5", "logits": [2.001, -1], "target": "0"},
        ),
    )
    found = published.read_expert_logits(path)
    assert found.ids == ("a", "5")
    assert found.logits_NL.tolist() == [[0.1, 0.9], [2.001, -1]]
    assert found.target_N.tolist() == [1, 0]
    assert (found.same_lines, found.close_lines) == (1, 1)


def test_what_is_written_is_read_back(tmp_path):
    ids, logits = ("a", "b"), np.array([[0.5, -1.0, 2.0], [1.0, 0.0, 3.0]])
    target = np.array([1, 0])
    published.write_expert_logits(tmp_path / "e", ids, logits_NL=logits, target_N=target)
    published.write_fuser_logits(tmp_path / "f", ids, logits_NL=logits)
    published.write_test_logits(tmp_path / "t.json", ids, logits_NL=logits)
    for found in (
        published.read_expert_logits(tmp_path / "e"),
        published.read_fuser_logits(tmp_path / "f"),
        published.read_test_logits(tmp_path / "t.json"),
    ):
        assert found.ids == ids
        assert found.logits_NL.tolist() == logits.tolist()
    assert json.loads((tmp_path / "f").read_text().splitlines()[0])["logits"] == {
        **{"R": 0.5, "U": -1.0, "AS": 2.0}
    }
    published.write_split(tmp_path / "s.json", {"a": {"text": "é", "label": 1}})
    assert published.read_split(tmp_path / "s.json") == {"a": {"text": "é", "label": 1}}
    assert published.read_split(put(tmp_path / "none.json", "{}")) == {}


def test_captions(tmp_path):
    path = put(tmp_path / "c.jsonl", lines({"image": "x/1_60.jpg", "caption": "A man."}))
    assert published.read_captions(path) == {"1_60": "A man."}
    assert published.read_captions(put(tmp_path / "c.json", '{"1": "A."}')) == {"1": "A."}


GOOD = {"image_id": "a", "logits": [0.1, 0.9], "target": 1}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("{", r"e.jsonl: line 2, column 2: not valid JSON"),
        ({"logits": [1, 2], "target": 1}, "line 2, id '\\?': key 'image_id' is missing"),
        (GOOD | {"image_id": None}, "'image_id' must be a text or a whole number, is None"),
        (GOOD | {"image_id": "b", "logits": [1]}, "line 2, id 'b': key 'logits' must be a list of"),
        (GOOD | {"image_id": "b", "logits": [1, "2"]}, "'logits' must be a number, is a text"),
        ('{"image_id": "b", "logits": [1, NaN], "target": 0}', "must be finite, is nan"),
        (GOOD | {"image_id": "b", "target": 2}, "'target' must be a class from 0 to 1, is 2"),
        (GOOD | {"image_id": "b", "target": None}, "'target' must be a class"),
        (GOOD | {"image_id": "b", "logits": [1, 2, 3]}, "has 3 numbers, the lines before 2"),
        (GOOD | {"target": 0}, "line 2, id 'a': key 'target' contradicts line 1"),
        (GOOD | {"logits": [0.9, 0.1]}, "key 'logits' contradicts line 1"),
        ('{"image_id": "b", "image_id": "c"}', "key 'image_id' occurs twice"),
    ],
)
def test_expert_lines_that_deviate(tmp_path, second, message):
    text = second if isinstance(second, str) else json.dumps(second)
    path = put(tmp_path / "e.jsonl", json.dumps(GOOD) + "\n" + text + "\n")
    with pytest.raises(DataError, match=message):
        published.read_expert_logits(path)


def test_one_object_files_that_deviate(tmp_path):
    record = {"logits": {"Yes": 1, "No": 0}, "gth": 1, "pred": 1}
    bad = {"a": record, "b": record | {"logits": {"Yes": 1}}}
    path = put(tmp_path / "l.json", json.dumps(bad, indent=1))
    with pytest.raises(DataError, match="line 10, id 'b': key 'logits' must be an object of No"):
        published.read_labels(path)
    with pytest.raises(DataError, match="one object id -> record, is a list"):
        published.read_labels(put(tmp_path / "l.json", "[]"))
    with pytest.raises(DataError, match="holds no record"):
        published.read_expert_logits(put(tmp_path / "l.json", "\n"))
    path = put(tmp_path / "f", lines({"image_id": "a", "logits": {"R": 1, "U": 1, "S": 1}}))
    with pytest.raises(DataError, match="R, U, AS, has"):
        published.read_fuser_logits(path)
    with pytest.raises(DataError, match="is not there"):
        published.read_split(tmp_path / "nothing.json")


def test_a_published_folder_is_found_in_both_nestings(tmp_path):
    for nested, root in (("mustard_data/", tmp_path / "one"), ("", tmp_path / "two")):
        for category, ids in (("R", ["1"]), ("U", ["2", "3"]), ("AS", [])):
            name = published.split_name("mustard", category, "validation")
            content = {sample_id: {"sarcasm": True} for sample_id in ids}
            put(root / f"{nested}data_split_output" / name, json.dumps(content))
        put(root / "expert_inference_output/expert_blip2/mustard_R_logits.jsonl", lines(GOOD))
        folder = published.PublishedFolder(root, "mustard")
        assert folder.split_ids("validation") == {"1": "R", "2": "U", "3": "U"}
        assert [path.name for path in folder.expert_folders()] == ["expert_blip2"]
        with pytest.raises(DataError, match=r"no mustard_data/data_split_output/mustard_R_dataset"):
            folder.split_ids("test")
        with pytest.raises(DataError, match=r"mustard_text_only_pred_qwen2_for_fuser.json"):
            folder.labels("text", for_fuser=True)
    assert "val_cogvlm2_qwen2.json" in published.split_name("mustard", "R", "validation")
