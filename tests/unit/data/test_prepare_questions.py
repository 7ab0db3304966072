import json
from pathlib import Path

import numpy as np
import pytest

from launch import prepare_data
from launch.scoring import train_prior
from mm_moe.data.collate import Collator
from mm_moe.data.decode import decode_image
from mm_moe.data.sets.prepared import PreparedData
from mm_moe.errors import ConfigError, DataError
from tests import raw_layouts


def run(name, source, *flags):
    output = source.parent / "out"
    assert prepare_data.main([name, "--source", str(source), "--output", str(output), *flags]) == 0
    return PreparedData(str(output))


def samples(source, split):
    return [source.to_sample(row) for row in source.stream(split)]


def test_vqa_v2_vocabulary_and_shares(tmp_path):
    source = run("vqa_v2", raw_layouts.vqa_v2(tmp_path / "raw"))
    # "Yes", "yes." and "the yes" are one answer, "two" and "2" another; each is the main answer of
    # nine training questions, "kite" of one
    assert source.label_names == ("2", "yes")
    assert (source.task, source.problem_type) == ("vqa", "multi_label_classification")
    assert source.splits() == ("train", "validation")
    train = samples(source, "train")
    assert train[0].label == {1: 1.0}
    assert train[1].label == {0: 1.0}
    assert train[18].label == {}  # "kite": a question without a share, but with a label
    assert (train[1].id, train[1].group) == ("1", "image 0")
    assert train[1].payload["text"] == "What is 1?"
    assert decode_image(train[1].payload["image"]).size == (8, 6)
    assert train_prior(source, "train") == pytest.approx(np.array([9, 9]) / 19)


def test_soft_labels_become_rows_of_shares(tmp_path):
    source = run("vqa_v2", raw_layouts.vqa_v2(tmp_path / "raw"), "--options", '{"min_count": 1}')
    assert source.label_names == ("2", "yes", "kite")
    collate = Collator(
        modalities=("text",),
        processors={"text": lambda texts: {}},
        problem_type=source.problem_type,
        num_labels=3,
    )
    labels = collate(samples(source, "train")[16:]).labels
    assert labels.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]


def test_vqa_v2_questions_without_answers_are_kept_and_not_scored(tmp_path):
    folder = raw_layouts.vqa_v2(tmp_path / "raw")
    questions, _ = raw_layouts.vqa_entries([500], answers=["yes"])
    name = "v2_OpenEnded_mscoco_test2015_questions.json"
    (folder / name).write_text(json.dumps({"questions": questions}))
    raw_layouts.coco(folder, "test2015", [500])
    source = run("vqa_v2", folder)
    assert "not public" in source.unlabelled["test"]
    assert samples(source, "test")[0].label is None


def test_vqa_vs_has_nine_further_test_sets_of_rows_of_the_first(tmp_path):
    source = run("vqa_vs", raw_layouts.vqa_vs(tmp_path / "raw"))
    others = [split for split in source.splits() if split.startswith("ood_")]
    assert len(others) == 9
    assert "ood_qt_kw_ko" in others
    iid = {sample.id: sample for sample in samples(source, "test")}
    for split in others:
        rows = samples(source, split)
        assert len(rows) == 3
        for row in rows:  # with answers of its own (QT) and with those of the IID set alike
            twin = iid[row.id.removeprefix(f"{split}-")]
            assert (row.label, row.payload, row.group) == (twin.label, twin.payload, twin.group)


def test_a_question_without_its_image_is_named(tmp_path):
    folder = raw_layouts.vqa_v2(tmp_path / "raw")
    (folder / "train2014" / "COCO_train2014_000000000003.jpg").unlink()
    source = run("vqa_v2", folder, "--max_bad_ratio", "0.2")
    lines = Path(source.data_dir, "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["6", "7"]
    assert "COCO_train2014_000000000003.jpg" in lines[0]


def test_a_vocabulary_of_nothing_is_refused(tmp_path):
    folder = raw_layouts.vqa_v2(tmp_path / "raw")
    with pytest.raises(DataError, match="min_count"):
        run("vqa_v2", folder, "--options", '{"min_count": 50}')


def test_nlvr2_pairs_come_in_order(tmp_path):
    source = run("nlvr2", raw_layouts.nlvr2(tmp_path / "raw"))
    assert source.modalities == ("image_0", "image_1", "text")
    for split, name in (("train", "train"), ("validation", "dev"), ("test", "test1")):
        first, second = samples(source, split)
        assert (first.id, first.label, first.group) == (f"{name}-10-3-0", 1, f"{name}-10-3")
        assert (second.label, second.payload["text"]) == (0, "There are 1 dogs.")
        left, right = (np.asarray(decode_image(first.payload[f"image_{n}"])) for n in (0, 1))
        assert left[0, 0].tolist() == [200, 0, 0]
        assert right[0, 0].tolist() == [0, 0, 200]


def test_nlvr2_rows_that_are_not_in_the_layout_are_named(tmp_path):
    folder = raw_layouts.nlvr2(tmp_path / "raw")
    table = folder / "data" / "train.json"
    good = json.loads(table.read_text().splitlines()[0])
    bad = [{**good, "identifier": "train-10-4-0", "label": "Maybe"}, {**good, "identifier": 3}]
    bad.append({k: v for k, v in good.items() if k != "directory"} | {"identifier": "train-1-1-0"})
    table.write_text("\n".join(map(json.dumps, [good, *bad])))
    source = run("nlvr2", folder, "--max_bad_ratio", "0.8")
    assert source.size("train") == 1
    lines = Path(source.data_dir, "quarantine.jsonl").read_text().splitlines()
    reasons = {json.loads(line)["reason"] for line in lines}
    assert reasons == {
        "no label True or False",
        "no identifier such as dev-1-0-0",
        "no number of a directory",
    }


def edited(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


QUESTIONS = "v2_OpenEnded_mscoco_train2014_questions.json"
ANSWERS = "v2_mscoco_train2014_annotations.json"


@pytest.mark.parametrize(("key", "value"), [("question", None), ("question_id", float("inf"))])
def test_vqa_question_that_is_none_is_quarantined(tmp_path, key, value):
    raw = raw_layouts.vqa_v2(tmp_path / "raw")
    edited(next(raw.rglob(QUESTIONS)), lambda c: c["questions"][0].__setitem__(key, value))
    source = run("vqa_v2", raw, "--max_bad_ratio", "0.5")
    assert source.info["splits"]["train"]["quarantined"] == 1
    assert "None" not in [sample.payload["text"] for sample in samples(source, "train")]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("question_id", None, "no number as question_id"),
        ("question_id", "x", "no number as question_id"),
        ("answers", ["yes"], "no answers"),
    ],
)
def test_vqa_answers_of_another_layout_are_named(tmp_path, key, value, says):
    raw = raw_layouts.vqa_v2(tmp_path / "raw")
    edited(next(raw.rglob(ANSWERS)), lambda c: c["annotations"][0].__setitem__(key, value))
    with pytest.raises(DataError, match=says):
        run("vqa_v2", raw)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe\n", b"[" * 100_000])
def test_tables_that_are_no_json(tmp_path, content):
    nlvr2, vqa = raw_layouts.nlvr2(tmp_path / "a" / "raw"), raw_layouts.vqa_v2(tmp_path / "raw")
    next(nlvr2.rglob("train.json")).write_bytes(content)
    next(vqa.rglob(QUESTIONS)).write_bytes(content)
    with pytest.raises(DataError, match="line 1 does not parse"):
        run("nlvr2", nlvr2)
    with pytest.raises(DataError, match="cannot be read"):
        run("vqa_v2", vqa)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("sentence", ["a"], "the sentence is no text"),
        ("identifier", "a\x00-0-0-0", "image file cannot be read"),
    ],
)
def test_nlvr2_rows_of_another_kind_are_quarantined(tmp_path, key, value, reason):
    raw = raw_layouts.nlvr2(tmp_path / "raw")
    path = next(raw.rglob("train.json"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0][key] = value
    path.write_text("\n".join(map(json.dumps, rows)))
    source = run("nlvr2", raw, "--max_bad_ratio", "0.5")
    assert source.info["splits"]["train"]["reasons"] == {reason: 1}


def test_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    words = ["nlvr2", "--source", str(raw_layouts.nlvr2(tmp_path / "raw"))]
    with pytest.raises(ConfigError, match="cannot be made"):
        prepare_data.main([*words, "--output", str(tmp_path / "file" / "out")])
