"""MMSD2.0, MUStARD and UR-FUNNY from their raw layouts."""

import json
import os
from pathlib import Path

import pytest

from launch import prepare_data
from mm_moe.data.prepare.mustard import split_ids
from mm_moe.data.sets.prepared import PreparedData
from mm_moe.data.streaming import SampleStream
from mm_moe.errors import ConfigError, DataError
from tests import raw_layouts


def run(name, source, **options):
    output = source.parent / f"out-{len(list(source.parent.iterdir()))}"
    flags = ["--source", str(source), "--output", str(output), "--options", json.dumps(options)]
    assert prepare_data.main([name, *flags]) == 0
    return PreparedData(str(output))


def samples(source, split):
    return list(SampleStream(source, split=split, batch_size=1, epochs=1))


def test_mmsd(tmp_path):
    source = run("mmsd", raw_layouts.mmsd(tmp_path / "raw"))
    assert source.modalities == ("image", "text")
    rows = samples(source, "validation")
    assert [(row.id, row.label) for row in rows] == [("807", 0), ("808", 1), ("809", 0)]
    assert rows[0].payload["text"] == "words of 807 # tag"
    assert source.label_names == ("not_sarcastic", "sarcastic")


def test_mustard_with_frames(tmp_path):
    raw = raw_layouts.mustard(tmp_path / "raw")
    source = run("mustard", raw)
    assert source.modalities == ("image", "text")
    test = samples(source, "test")
    assert [(row.id, row.label) for row in test] == [("2_484", 1), ("2_477", 0)]
    assert test[0].payload["text"] == "Well, 2_484."
    assert run("mustard", raw, context=True).modalities == ("image", "text", "context")
    assert run("mustard", raw, images=False).modalities == ("text", "context")


def test_mustard_in_its_original_layout(tmp_path):
    raw = raw_layouts.mustard_original(tmp_path / "raw")
    source = run("mustard", raw)
    assert source.modalities == ("text", "context")
    assert [source.size(split) for split in source.splits()] == [7, 2, 3]  # floor(9 / 4) = 2
    assert {row.id[0] for row in samples(source, "test")} == {"1"}  # FRIENDS
    assert samples(source, "test")[0].payload == {
        "text": "Well, 1_0.",
        "context": "Before 1_0.\nReally?",
    }
    assert source.info["options"]["split"] == "speaker_independent"
    named = run("mustard", raw, speaker=True, show=True)
    assert samples(named, "test")[0].payload == {
        "text": "[FRIENDS] SHELDON: Well, 1_0.",
        "context": "LEONARD: Before 1_0.\nPENNY: Really?",
    }
    mixed = run("mustard", raw, split="speaker_dependent", context=False)
    assert [mixed.size(split) for split in mixed.splits()] == [8, 2, 2]
    assert mixed.modalities == ("text",)


def test_urfunny(tmp_path):
    raw = raw_layouts.urfunny(tmp_path / "raw")
    rows = samples(run("urfunny", raw), "train")
    assert [(row.id, row.label) for row in rows][:2] == [("101", 0), ("102", 1)]
    assert rows[0].payload["text"] == "It was 101."
    rows = samples(run("urfunny", raw, context=True), "train")
    assert rows[1].payload["context"] == "So 102.\nAnd then."
    assert "context" not in rows[0].payload  # nothing was said before


LACKING = {"show": "FRIENDS"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"utterance": 3}, "utterance is no text"),
        ({"context": "words"}, "context is no list of texts"),
        ({"sarcasm": 2}, "wrong label: sarcasm is neither 0 nor 1"),
        (None, "the record is no object"),
        (LACKING, "no utterance in the record"),
    ],
)
def test_a_bad_record_goes_to_quarantine(tmp_path, change, reason):
    raw = raw_layouts.mustard_original(tmp_path / "raw")
    path = raw / "sarcasm_data.json"
    table = json.loads(path.read_text())
    table["1_1"] = change if change in (None, LACKING) else table["1_1"] | change
    path.write_text(json.dumps(table))
    flags = ["--source", str(raw), "--output", str(tmp_path / "out"), "--max_bad_ratio", "0.6"]
    assert prepare_data.main(["mustard", *flags]) == 0
    (line,) = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "1_1"
    assert reason in json.loads(line)["reason"]


def test_folders_and_options_that_do_not_fit(tmp_path):
    raw = raw_layouts.mmsd(tmp_path / "raw")
    for file in (raw / "mmsd_data/data_raw/images").iterdir():
        file.rename(file.with_suffix(".jpeg"))
    with pytest.raises(DataError, match=r"no image such as '801.jpg' .*itself, images.*: false"):
        run("mmsd", raw)
    with pytest.raises(DataError, match=r"no urfunny_dataset_train.json"):
        run("urfunny", raw)
    with pytest.raises(ConfigError, match="'mmsd' has no sentences before"):
        run("mmsd", raw, images=False, context=True)
    frames = raw_layouts.mustard(tmp_path / "frames")
    with pytest.raises(ConfigError, match="these tables have their splits"):
        run("mustard", frames, split="speaker_dependent")
    with pytest.raises(ConfigError, match="'random' is neither"):
        run("mustard", frames, split="random")


def test_the_real_split_has_the_published_sizes():
    beside = Path(__file__).parents[4] / "shared" / "data"
    path = Path(os.environ.get("MM_MOE_DATA", beside)) / "mustard" / "sarcasm_data.json"
    if not path.is_file():
        pytest.skip(f"no {path}; set MM_MOE_DATA to the folder of the data sets")
    records = json.loads(path.read_text())
    found = split_ids(records, by_speaker=True)
    sizes = {split: len(ids) for split, ids in found.items()}
    assert sizes == {"train": 251, "validation": 83, "test": 356}
    assert sum(records[key]["sarcasm"] for key in found["test"]) == 152
    assert len(set().union(*found.values())) == 690
