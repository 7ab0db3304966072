import errno
import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from launch import prepare_data
from mm_moe.data.collate import Collator
from mm_moe.data.decode import decode_image
from mm_moe.data.missing import MissingProtocol
from mm_moe.data.prepare import shards
from mm_moe.data.prepare.mm_imdb import GENRES
from mm_moe.data.prepare.options import check_options
from mm_moe.data.prepare.shards import SplitWriter
from mm_moe.data.sets.prepared import MmImdbData, PreparedData
from mm_moe.data.streaming import SampleStream
from mm_moe.data.table import import_legacy_table
from mm_moe.errors import ConfigError, DataError
from tests import raw_layouts
from tests.raw_layouts import put, put_json


def run(name, source, *flags, output=None):
    output = output or source.parent / "out"
    assert prepare_data.main([name, "--source", str(source), "--output", str(output), *flags]) == 0
    return PreparedData(str(output))


def samples(source, split):
    return list(SampleStream(source, split=split, batch_size=1, epochs=1))


def quarantine(source):
    lines = Path(source.data_dir, "quarantine.jsonl").read_text().splitlines()
    return {row["id"]: row["reason"] for row in map(json.loads, lines)}


def names(row, source):
    return [name for name, on in zip(source.label_names, row.label, strict=True) if on]


# ---- MM-IMDb ---------------------------------------------------------------------------------


def test_mm_imdb_has_a_row_for_each_plot(tmp_path, capsys):
    source = run("mm_imdb", raw_layouts.mm_imdb(tmp_path / "raw"))
    train = samples(source, "train")
    assert [row.id for row in train] == ["0000008#0", "0000008#1", "0012349#0", "0000012"]
    assert [row.group for row in train] == ["0000008", "0000008", "0012349", None]
    assert [row.payload.get("text") for row in train[:2]] == ["A man.", "A man sneezes."]
    assert "text" not in train[3].payload
    assert [names(row, source) for row in train[:3:2]] == [
        ["Documentary", "Short"],
        ["Drama", "Comedy", "Family"],
    ]
    assert decode_image(train[0].payload["image"]).size == (8, 6)
    assert source.label_names == GENRES
    assert (GENRES[0], GENRES[10], GENRES[22], len(GENRES)) == ("Drama", "Sci-Fi", "Film-Noir", 23)
    assert [source.size(split) for split in source.splits()] == [4, 1, 1]
    said = capsys.readouterr().out
    assert "train: 4 rows; 1 without text" in said
    assert "--dataset mm_imdb --data_dir" in said


def test_mm_imdb_per_movie(tmp_path):
    raw = raw_layouts.mm_imdb(tmp_path / "raw")
    source = run("mm_imdb", raw, "--options", '{"per": "movie"}')
    assert [row.id for row in samples(source, "train")] == ["0000008", "0012349", "0000012"]
    assert source.info["options"] == {"per": "movie"}


def test_plots_of_a_movie_lack_the_same(tmp_path):
    source = run("mm_imdb", raw_layouts.mm_imdb(tmp_path / "raw"))
    plots = samples(source, "train")[:2]
    fates = set()
    for seed in range(12):
        protocol = MissingProtocol(dataset="m", split="s", kind="both", ratio=0.5, seed=seed)
        present = present_under(protocol, plots)
        assert present[0] == present[1]
        fates.add(tuple(present[0]))
    assert len(fates) == 3  # complete, no image, no text


def present_under(missing, rows):
    """What a collator leaves of some MM-IMDb rows."""
    collate = Collator(
        modalities=("image", "text"),
        processors={"image": lambda images: {}, "text": lambda texts: {}},
        problem_type="multi_label_classification",
        num_labels=23,
        missing=missing,
    )
    return collate(rows).present.tolist()


def test_an_old_table_has_a_code_for_each_movie_not_for_each_plot(tmp_path):
    raw = raw_layouts.mm_imdb(tmp_path / "raw")
    source = run("mm_imdb", raw)
    torch.save(torch.tensor([2.0, 1.0, 0.0]), tmp_path / "old.pt")  # no image, no text, complete
    movies = json.loads((raw / "split.json").read_text())["train"]
    table = import_legacy_table(tmp_path / "old.pt", ids=movies)
    found = present_under(table, samples(source, "train"))
    assert found == [[False, True], [False, True], [True, False], [True, False]]
    words = "66.7% = 66.7% of samples lack something: 33.3% no text, 33.3% no image"
    assert table.describe() == words


# ---- Food-101 and Hateful Memes --------------------------------------------------------------


def test_food101(tmp_path, capsys):
    source = run("food101", raw_layouts.food101(tmp_path / "raw"))
    train = samples(source, "train")
    assert [(row.id, row.label, "text" in row.payload) for row in train] == [
        ("apple_pie_0.jpg", 0, True),
        ("french_fries_11.jpg", 1, True),
        ("apple_pie_2.jpg", 0, False),
    ]
    assert source.label_names == ("apple_pie", "french_fries")
    assert samples(source, "validation")[0].id == "french_fries_3.jpg"
    assert source.info["splits"]["train"]["missing"] == {"image": 0, "text": 1}
    assert "1 without text" in capsys.readouterr().out


@pytest.mark.parametrize("nested", [False, True])
def test_hateful_memes_in_both_layouts(tmp_path, nested, capsys):
    source = run("hateful_memes", raw_layouts.hateful_memes(tmp_path / "raw", nested=nested))
    assert [(row.id, row.label) for row in samples(source, "train")] == [("1231", 0), ("1232", 1)]
    assert source.task == "binary"
    assert [row.label for row in samples(source, "test")] == [None, None]
    assert "test cannot be scored: no row of test.jsonl has a label" in capsys.readouterr().out
    assert "test_seen.jsonl" in source.unlabelled["test"]


def test_hateful_memes_with_the_seen_test_table(tmp_path):
    raw = raw_layouts.hateful_memes(tmp_path / "raw")
    source = run("hateful_memes", raw, "--options", '{"test_file": "test_seen.jsonl"}')
    assert [row.label for row in samples(source, "test")] == [0, 1]
    assert source.unlabelled == {}
    assert "test_seen.jsonl" in source.info["sources"]


# ---- bad rows --------------------------------------------------------------------------------


def test_every_bad_row_is_named_and_none_is_dropped(tmp_path, capsys):
    raw = raw_layouts.mm_imdb(tmp_path / "raw")
    ids = [f"{n:07d}" for n in range(1, 7)]
    for name in ids:
        put(raw / "images" / f"{name}.jpeg", raw_layouts.jpeg())
        put_json(raw / "labels" / f"{name}.json", {"plot": ["p"], "genres": ["Drama"]})
    put(raw / "images" / f"{ids[0]}.jpeg", raw_layouts.jpeg()[:90])
    (raw / "images" / f"{ids[1]}.jpeg").unlink()
    put_json(raw / "labels" / f"{ids[2]}.json", {"plot": ["p"], "genres": ["News"]})
    put_json(raw / "labels" / f"{ids[3]}.json", {"plot": "p", "genres": ["Drama"]})
    (raw / "labels" / f"{ids[4]}.json").unlink()
    split = json.loads((raw / "split.json").read_text())
    split["train"] += [*ids, "../split"]
    split["test"] += [ids[5]]
    put_json(raw / "split.json", split)
    source = run("mm_imdb", raw, "--max_bad_ratio", "0.7")
    found = quarantine(source)
    assert found.pop(f"{ids[0]}#0").startswith("image does not decode")
    assert found == {
        f"{ids[1]}#0": f"image file is missing: {ids[1]}.jpeg",
        ids[2]: "no label: none of the 23 genres",
        ids[3]: "no list of plots or no list of genres",
        ids[4]: "label file is missing or holds no JSON object",
        "../split": "the id is no file name",
        f"{ids[5]}#0": "duplicate id, first in train",
    }
    record = source.info["splits"]["train"]
    assert record["rows"] == 5
    assert record["quarantined"] == 6 == sum(record["reasons"].values())
    assert "6 in quarantine" in capsys.readouterr().out


def test_too_many_bad_rows_stop_it_and_leave_nothing(tmp_path):
    raw = raw_layouts.food101(tmp_path / "raw")
    (raw / "images" / "train" / "apple_pie" / "apple_pie_0.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 3 rows of split 'train' .* 0.01 .*apple_pie_0.jpg"):
        run("food101", raw)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]
    assert run("food101", raw, "--max_bad_ratio", "0.4").size("train") == 2


def test_labels_that_lack_in_a_labelled_table_are_bad_rows(tmp_path):
    raw = raw_layouts.hateful_memes(tmp_path / "raw", test_labels=True)
    line = json.dumps({"id": 7, "img": "img/01231.png", "text": "t"})
    other = json.dumps({"id": 8, "img": "img/01231.png", "text": "t", "label": 3})
    away = json.dumps({"id": 9, "img": "../../x.png", "text": "t", "label": 1})
    table = raw / "test.jsonl"
    table.write_text(f"{table.read_text()}{line}\n{other}\n{away}\n[]\n")
    found = quarantine(run("hateful_memes", raw, "--max_bad_ratio", "1"))
    assert found["7"] == "no label"
    assert "the label of sample '8' is 3, outside the 2 classes" in found["8"]
    assert found["9"] == "img leads out of the folder"
    assert found["test.jsonl:6"] == "no id, or no img"


# ---- the output ------------------------------------------------------------------------------


def test_workers_and_shards_do_not_change_the_rows(tmp_path, monkeypatch):
    raw = raw_layouts.mm_imdb(tmp_path / "raw")
    whole = run("mm_imdb", raw)
    monkeypatch.setattr(shards, "ROWS_PER_GROUP", 1)
    monkeypatch.setattr(shards, "ROWS_PER_FILE", 2)
    cut = run("mm_imdb", raw, "--workers", "2", output=tmp_path / "cut")
    assert [file["rows"] for file in cut.info["splits"]["train"]["files"]] == [2, 2]
    assert samples(cut, "train") == samples(whole, "train")
    for split in cut.splits():
        first, second = (source.info["splits"][split] for source in (whole, cut))
        assert first["content_sha256"] == second["content_sha256"]
    assert [sample.id for sample in cut.index("train")] == [s.id for s in samples(whole, "train")]


def test_an_output_is_replaced_only_on_request(tmp_path):
    raw = raw_layouts.food101(tmp_path / "raw")
    first = run("food101", raw).fingerprint()
    with pytest.raises(ConfigError, match=r"already; name a new folder or replace .*--overwrite"):
        run("food101", raw)
    put_json(raw / "text.json", {})
    assert run("food101", raw, "--overwrite").fingerprint() != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]
    mine = put(tmp_path / "mine" / "letter.txt", "dear")
    with pytest.raises(ConfigError, match="no prepared data set"):
        run("food101", raw, "--overwrite", output=mine.parent)
    assert mine.read_text() == "dear"


@pytest.mark.parametrize(
    ("name", "lost", "said"),
    [
        ("mm_imdb", "split.json", "there is no split.json"),
        ("mm_imdb", "images", "there is no images"),
        ("food101", "text.json", "there is no text.json"),
        ("food101", "images/test", "there is no images/test"),
        ("hateful_memes", "dev.jsonl", "there is no dev.jsonl"),
        ("hateful_memes", "img", "there is no img"),
    ],
)
def test_a_wrong_layout_names_the_first_missing_file(tmp_path, name, lost, said):
    raw = getattr(raw_layouts, name)(tmp_path / "raw")
    path = raw / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataError, match=said):
        run(name, raw)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw"]


def test_an_index_that_does_not_parse(tmp_path):
    raw = raw_layouts.food101(tmp_path / "raw")
    put(raw / "split.json", '{"train": [}')
    with pytest.raises(DataError, match=r"split.json is not valid JSON.* line 1, column 12"):
        run("food101", raw)
    put_json(raw / "split.json", {"train": []})
    with pytest.raises(DataError, match="no list 'val'"):
        run("food101", raw)
    put_json(raw / "class_idx.json", {"apple_pie": 1, "french_fries": 2})
    with pytest.raises(DataError, match="does not number its 2 classes from 0"):
        run("food101", raw)


def test_flags_that_cannot_work(tmp_path):
    raw = raw_layouts.food101(tmp_path / "raw")
    for flags, said in (
        (["--workers", "0"], "--workers 0"),
        (["--max_bad_ratio", "2"], "--max_bad_ratio 2"),
        (["--options", '{"sylte": 1}'], "unknown option 'sylte'; it has no options"),
        (["--options", "{"], "JSON"),
    ):
        with pytest.raises(ConfigError, match=said):
            run("food101", raw, *flags)
    with pytest.raises(ConfigError, match=r"'fod101'; did you mean food101"):
        run("fod101", raw)
    with pytest.raises(DataError, match="is no folder"):
        run("food101", tmp_path / "absent")


def test_options_of_the_wrong_type_are_told():
    class Adapter:
        def __init__(self, source, *, hours: float = 1.0, task: str | None = None, n: int = 1):
            pass

    good = {"hours": 2, "task": None, "n": 3}
    check_options(Adapter, good, name="x")
    for option, value, said in (
        ("hours", "48", "hours is '48'; it takes a number"),
        ("hours", float("nan"), "it takes a number"),
        ("n", 1.5, "n is 1.5; it takes a whole number"),
        ("n", True, "it takes a whole number"),
        ("n", 10**30, "it takes a whole number"),
        ("task", ["a"], "it takes a text or null"),
        ("hour", 1, "unknown option 'hour'; did you mean hours"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            check_options(Adapter, good | {option: value}, name="x")


def test_outputs_that_cannot_be(tmp_path, monkeypatch):
    raw = raw_layouts.hateful_memes(tmp_path / "raw")
    words = ["hateful_memes", "--source", str(raw), "--output"]
    (tmp_path / "file").write_text("mine")
    for output, said in (
        (tmp_path / "file", "is no prepared data set"),
        (tmp_path / "file" / "out", "cannot be made"),
        (tmp_path / ("x" * 300), "cannot be read|cannot be made"),
        ("/", "root of the file system"),
    ):
        with pytest.raises(ConfigError, match=said):
            prepare_data.main([*words, str(output)])
    (tmp_path / "link").symlink_to(tmp_path / "behind")
    assert prepare_data.main([*words, str(tmp_path / "link")]) == 0
    assert (tmp_path / "behind" / "dataset_info.json").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert prepare_data.main([*words, "."]) == 0
    assert (tmp_path / "here" / "dataset_info.json").is_file()


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    raw = raw_layouts.hateful_memes(tmp_path / "raw")
    monkeypatch.setattr(SplitWriter, "add", full)
    with pytest.raises(DataError, match=r"cannot be written to .*No space left on device"):
        run("hateful_memes", raw)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_a_prepared_folder_is_checked_when_it_is_opened(tmp_path):
    out = run("food101", raw_layouts.food101(tmp_path / "raw")).data_dir
    with pytest.raises(DataError, match=r"holds 'food101', not 'mm_imdb'; take --dataset food101"):
        MmImdbData(str(out))
    with pytest.raises(ConfigError, match=r"launch/prepare_data.py mm_imdb --source"):
        MmImdbData()
    with pytest.raises(DataError, match=r"no .*dataset_info.json; make it with"):
        PreparedData(str(tmp_path))
    shard = out / "train-00000.parquet"
    assert pq.read_schema(shard).names == ["id", "group", "mask_key", "image", "text", "label"]
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"train-00000.parquet has \d+ bytes, its record says"):
        PreparedData(str(out))
    shard.unlink()
    with pytest.raises(DataError, match=r"train-00000.parquet is not there"):
        PreparedData(str(out))
    info = json.loads((out / "dataset_info.json").read_text())
    put_json(out / "dataset_info.json", {**info, "format": "mm_moe.prepared.v0"})
    with pytest.raises(DataError, match=r"format 'mm_moe.prepared.v0'"):
        PreparedData(str(out))
