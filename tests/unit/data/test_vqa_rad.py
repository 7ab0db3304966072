import collections
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mm_moe.data.sets.vqa_rad import VqaRadData
from mm_moe.errors import ConfigError, DataError
from tests.raw_layouts import jpeg, put_json


@pytest.fixture
def folder(tmp_path):
    """Twelve questions on four images; the published file mixes numbers and texts."""
    kinds = ["freeform", "para", "test_freeform", "test_para"]
    answers = ["Yes", "no", "The lung", "lung", 4, "rare"]
    rows = [
        {
            "qid": str(n),
            "phrase_type": kinds[n % 4],
            "image_name": f"synpic{n % 4}.jpg",
            "question": f"What is {n}?",
            "answer": answers[n % 6],
            "answer_type": "CLOSED " if n % 6 < 2 else "OPEN",
        }
        for n in range(24)
    ]
    put_json(tmp_path / "vqa_rad.json", rows)
    names = [f"synpic{n}.jpg" for n in range(4)]
    images = [{"bytes": jpeg(), "path": name} for name in names]
    pq.write_table(pa.table({"image_name": names, "image": images}), tmp_path / "images.parquet")
    return tmp_path


def samples(source, split):
    return [source.to_sample(row) for row in source.stream(split)]


def everything(source):
    return {split: list(source.index(split)) for split in source.splits()}


def test_closed_questions_are_yes_or_no(folder):
    source = VqaRadData(str(folder))
    found = everything(source)
    assert sum(map(len, found.values())) == 8  # n % 6 in (0, 1)
    assert source.label_names == ("no", "yes")
    test = {s.id: s for s in samples(source, "test")}
    assert test["q6"].label == 1
    assert test["q7"].label == 0
    assert test["q6"].payload["text"] == "What is 6?"
    assert test["q6"].payload["image"] == jpeg()


def test_the_test_split_is_the_published_one(folder):
    for questions in ("closed", "open", "all"):
        source = VqaRadData(str(folder), questions=questions)
        kinds = {
            f"q{row['qid']}": row["phrase_type"] for row in json.loads(source.path.read_text())
        }
        for split, rows in everything(source).items():
            assert all(kinds[s.id].startswith("test") == (split == "test") for s in rows)


def test_open_answers_outside_the_vocabulary_have_no_share(folder):
    source = VqaRadData(str(folder), questions="open", min_count=1)
    train = collections.Counter(row["answer"] for row in source._rows["train"])
    assert set(source.label_names) <= {"lung", "4", "rare"}
    assert source.task == "vqa"
    for sample in source.index("test"):
        assert sample.label in [{}, *({n: 1.0} for n in range(len(source.label_names)))]
    assert sum(train.values()) == source.size("train")


def test_an_image_validates_or_trains(folder):
    found = everything(VqaRadData(str(folder), questions="all"))
    assert not {s.group for s in found["train"]} & {s.group for s in found["validation"]}


def test_options_are_checked(folder):
    with pytest.raises(ConfigError, match="closed, open, all"):
        VqaRadData(str(folder), questions="yes")
    with pytest.raises(ConfigError, match="data_dir"):
        VqaRadData()
    (folder / "vqa_rad.json").write_text('[{"qid": "1"}]')
    with pytest.raises(DataError, match="lacks 'image_name'"):
        VqaRadData(str(folder)).size("train")


def test_images_that_are_null_or_bare_bytes(folder):
    names = [f"synpic{n}.jpg" for n in range(4)]
    for images, missing in (([None, *[{"bytes": jpeg(), "path": ""}] * 3], 1), ([jpeg()] * 4, 0)):
        table = pa.table({"image_name": names, "image": images})
        pq.write_table(table, folder / "images.parquet")
        source = VqaRadData(str(folder), questions="all")
        every = [sample for split in source.splits() for sample in samples(source, split)]
        found = {sample.group for sample in every if "image" not in sample.payload}
        assert len(found) == missing
