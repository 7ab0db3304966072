import csv
import gc
import io
import json
import pickle
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mm_moe.data.decode import decode_image
from mm_moe.data.sets.columns import ColumnsData
from mm_moe.data.streaming import SampleStream
from mm_moe.errors import ConfigError, DataError

ROWS = [
    {"file": "pics/a.png", "words": "red thing", "kind": "pear", "key": "r1"},
    {"file": "pics/b.png", "words": "blue thing", "kind": "apple", "key": "r2"},
    {"file": "pics/c.png", "words": "", "kind": "pear", "key": "r3"},
]
COLORS = {"a": (200, 0, 0), "b": (0, 0, 200), "c": (0, 200, 0)}
NAMED = {"image_column": "file", "text_column": "words", "label_column": "kind"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pics").mkdir()
    for name, color in COLORS.items():
        Image.new("RGB", (4, 4), color).save(tmp_path / "pics" / f"{name}.png")
    return tmp_path


def write_csv(path, rows=ROWS, sep=","):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=sep)
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path, rows=ROWS):
    path.write_text("\n".join(json.dumps(row) for row in rows))


def write_parquet(path, rows=ROWS):
    pq.write_table(pa.Table.from_pylist(rows), path)


WRITERS = {
    "csv": write_csv,
    "tsv": lambda path: write_csv(path, sep="\t"),
    "jsonl": write_jsonl,
    "parquet": write_parquet,
}


def samples(source, split="train"):
    return list(SampleStream(source, split=split, batch_size=1, epochs=1))


def first_pixel(sample):
    return decode_image(sample.payload["image"]).getpixel((0, 0))


@pytest.mark.parametrize("kind", sorted(WRITERS))
def test_every_table_format_with_image_paths_beside_it(folder, kind):
    WRITERS[kind](folder / f"train.{kind}")
    source = ColumnsData(str(folder), **NAMED, id_column="key")
    assert source.modalities == ("image", "text")
    assert source.label_names == ("apple", "pear")
    assert source.size("train") == 3
    found = samples(source)
    assert [sample.id for sample in found] == ["r1", "r2", "r3"]
    assert [sample.label for sample in found] == [1, 0, 1]
    assert [first_pixel(sample) for sample in found] == list(COLORS.values())
    assert [sample.payload.get("text") for sample in found] == ["red thing", "blue thing", None]


def test_csv_files_are_closed_when_a_stream_ends_or_is_dropped(folder):
    write_csv(folder / "train.csv")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", ResourceWarning)
        stream = ColumnsData(str(folder), text_column="words").stream("train")
        rows = list(stream)
        dropped = iter(stream)
        assert next(dropped) == rows[0]
        del dropped
        gc.collect()
    assert [str(warning.message) for warning in seen] == []
    assert list(pickle.loads(pickle.dumps(stream))) == rows  # as for a worker of a loader


def test_splits_from_the_words_of_file_names(folder):
    for name in ("train-0.csv", "train-1.csv", "my_dev.csv", "test.csv"):
        write_csv(folder / name)
    source = ColumnsData(str(folder), **NAMED)
    assert source.splits() == ("train", "validation", "test")
    assert [source.size(split) for split in source.splits()] == [6, 3, 3]


def test_splits_from_folders_patterns_and_single_files(folder):
    (folder / "train").mkdir()
    write_parquet(folder / "train" / "0.parquet")
    assert ColumnsData(str(folder), text_column="words").splits() == ("train",)
    write_parquet(folder / "fold1.parquet")
    write_parquet(folder / "fold2.parquet")
    with pytest.raises(DataError, match=r"2 tables .* belong to no split .* fold1.parquet"):
        ColumnsData(str(folder), text_column="words")
    source = ColumnsData(
        str(folder), text_column="words", train="fold*.parquet", test="*/0.parquet"
    )
    assert {split: source.size(split) for split in source.splits()} == {"train": 6, "test": 3}
    alone = ColumnsData(str(folder / "fold1.parquet"), text_column="words", test="fold2.parquet")
    assert alone.splits() == ("train", "test")
    with pytest.raises(DataError, match=r"no file in .* matches 'x\*.csv' \(train\)"):
        ColumnsData(str(folder), text_column="words", train="x*.csv")


def test_mixed_formats_need_a_pattern(folder):
    write_csv(folder / "train.csv")
    write_jsonl(folder / "test.jsonl")
    with pytest.raises(DataError, match=r"2 formats \(.csv, .jsonl\)"):
        ColumnsData(str(folder), text_column="words")
    assert ColumnsData(str(folder), text_column="words", train="*.csv").splits() == ("train",)


def test_image_folder(tmp_path):
    for split, kinds in {"train": "ab", "test": "b"}.items():
        for kind in kinds:
            place = tmp_path / split / kind
            place.mkdir(parents=True)
            Image.new("RGB", (2, 2), COLORS[kind]).save(place / f"{split}0.png")
    source = ColumnsData(str(tmp_path), image_column="image", label_column="label")
    assert source.splits() == ("train", "test")
    assert source.label_names == ("a", "b")
    found = {sample.id: sample for sample in samples(source)}
    assert set(found) == {"train/a/train0.png", "train/b/train0.png"}
    assert found["train/b/train0.png"].label == 1
    assert first_pixel(found["train/b/train0.png"]) == COLORS["b"]
    assert [sample.label for sample in samples(source, "test")] == [1]
    assert source.size("train") == 2


def test_images_inside_parquet(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (1, 2, 3)).save(buffer, "PNG")
    cell = {"bytes": buffer.getvalue(), "path": None}
    write_parquet(
        tmp_path / "train.parquet", [{"picture": cell, "y": 3}, {"picture": cell, "y": 12}]
    )
    source = ColumnsData(str(tmp_path), image_column="picture", label_column="y")
    assert source.label_names == ("3", "12")  # numbers in their own order
    found = samples(source)
    assert first_pixel(found[0]) == (1, 2, 3)
    assert [sample.label for sample in found] == [0, 1]


def test_ids_without_a_column_are_content_not_place(folder, tmp_path_factory):
    write_csv(folder / "train.csv")
    other = tmp_path_factory.mktemp("elsewhere")
    write_csv(other / "train.csv", ROWS[::-1])
    ids = [sample.id for sample in samples(ColumnsData(str(folder), **NAMED))]
    assert len(set(ids)) == 3
    assert [sample.id for sample in samples(ColumnsData(str(other), **NAMED))] == ids[::-1]


def test_other_problem_types(tmp_path):
    rows = [{"words": "x", "tags": ["b", "a"], "y": 0.5}, {"words": "z", "tags": [], "y": None}]
    write_parquet(tmp_path / "train.parquet", rows)
    many = ColumnsData(
        str(tmp_path),
        text_column="words",
        label_column="tags",
        problem_type="multi_label_classification",
    )
    assert many.label_names == ("a", "b")
    assert [sample.label for sample in samples(many)] == [[1, 1], [0, 0]]
    number = ColumnsData(
        str(tmp_path), text_column="words", label_column="y", problem_type="regression"
    )
    assert [sample.label for sample in samples(number)] == [0.5, None]
    assert number.label_names == ()
    nothing = ColumnsData(str(tmp_path), text_column="words")
    assert (nothing.problem_type, samples(nothing)[0].label) == ("none", None)
    with pytest.raises(DataError, match="lists are for multi_label_classification"):
        _ = ColumnsData(str(tmp_path), text_column="words", label_column="tags").label_names


def test_empty_labels_are_unknown_labels(tmp_path):
    (tmp_path / "train.csv").write_text("words,y\nx,1\nz,\nw,0\n")
    source = ColumnsData(str(tmp_path), text_column="words", label_column="y")
    assert source.label_names == ("0", "1")
    assert [sample.label for sample in samples(source)] == [1, None, 0]


def test_given_label_names_and_a_label_outside_them(folder):
    write_csv(folder / "train.csv")
    source = ColumnsData(str(folder), **NAMED, label_names=["pear", "apple", "fig"])
    assert [sample.label for sample in samples(source)] == [0, 1, 0]
    source = ColumnsData(str(folder), **NAMED, id_column="key", label_names=["pears"])
    with pytest.raises(DataError, match=r"'r1' has the label 'pear'.*did you mean pears"):
        samples(source)


def test_a_class_that_train_does_not_know(folder):
    write_csv(folder / "train.csv")
    write_csv(folder / "test.csv", [{**ROWS[0], "kind": "fig"}])
    with pytest.raises(DataError, match="label 'fig', which is none of the 2 classes"):
        samples(ColumnsData(str(folder), **NAMED), "test")


def test_errors_of_the_user(folder):
    write_csv(folder / "train.csv")
    with pytest.raises(DataError, match=r"no column 'word'; it has: file, words, kind, key\."):
        ColumnsData(str(folder), text_column="word").stream("train")
    with pytest.raises(DataError, match="no split 'test'; it has: train"):
        ColumnsData(str(folder), text_column="words").stream("test")
    with pytest.raises(DataError, match="no file or folder /no/such"):
        ColumnsData("/no/such", text_column="words")
    with pytest.raises(ConfigError, match=r"task 'sentiment_mosi' does not fit .* binary"):
        ColumnsData(str(folder), **NAMED, task="sentiment_mosi")
    assert ColumnsData(str(folder), **NAMED, task="binary").task == "binary"
    with pytest.raises(ConfigError, match="needs data_dir"):
        ColumnsData(text_column="words")
    with pytest.raises(ConfigError, match="at least one of image_column"):
        ColumnsData(str(folder))
    with pytest.raises(ConfigError, match="'regresion'; did you mean regression"):
        ColumnsData(str(folder), text_column="words", problem_type="regresion")
    with pytest.raises(ConfigError, match="does not fit label_column None"):
        ColumnsData(str(folder), text_column="words", problem_type="regression")


def test_a_hub_name_that_cannot_be_reached_is_an_error_of_the_user():
    with pytest.raises(DataError, match="'nobody/nothing' cannot be read"):
        ColumnsData("nobody/nothing", text_column="words")


def test_content_decides_the_fingerprint(folder):
    write_csv(folder / "train.csv")
    before = ColumnsData(str(folder), **NAMED).fingerprint()
    assert ColumnsData(str(folder), **NAMED).fingerprint() == before
    write_csv(folder / "train.csv", [*ROWS[:2], {**ROWS[2], "words": "x"}])
    assert ColumnsData(str(folder), **NAMED).fingerprint() != before


def test_no_row_stands_in_an_error(folder):
    (folder / "train.csv").write_text("words,y\nplanted secret,1\nplanted secret,2,3,4\n")
    with pytest.raises(DataError) as caught:
        samples(ColumnsData(str(folder), text_column="words"))
    assert "planted" not in str(caught.value)
