"""Stored missing tables for a run: which split they are for, and what does not fit."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from launch.tables import describe_tables, mask_keys, read_tables, settle_tables
from mm_moe.data.missing import MissingProtocol
from mm_moe.data.table import MissingTable, table_of
from mm_moe.errors import ConfigError, DataError
from tests.patchy import NUM_ROWS, Patchy, model_of, scorer_of

SOURCE = Patchy()
KEYS = [f"row-{n}" for n in range(NUM_ROWS)]


def stored(folder, *, split="test", dataset="patchy", ids=KEYS, modalities=("image", "text")):
    protocol = MissingProtocol(dataset=dataset, split=split, kind="both", ratio=0.5)
    path = folder / f"{split}.json"
    table_of(protocol, ids=ids, modalities=modalities).save(path)
    return str(path)


def legacy(folder, name, rows=NUM_ROWS):
    torch.save(torch.tensor([0.0, 1.0, 2.0, 0.0] * (rows // 4)), folder / name)
    return str(folder / name)


def test_a_table_of_ours_names_its_split(tmp_path):
    assert mask_keys(SOURCE, "test") == KEYS
    tables = read_tables([stored(tmp_path), stored(tmp_path, split="train")], source=SOURCE)
    assert list(tables) == ["test", "train"]
    protocol = MissingProtocol(dataset="patchy", split="test", kind="both", ratio=0.5)
    names = Patchy.modalities
    assert torch.equal(tables["test"].present(KEYS, names), protocol.present(KEYS, names))
    record = describe_tables(tables)["test"]
    assert record["sha256"] == protocol.table_hash(KEYS, names)
    assert (record["samples"], record["origin"]["ratio"]) == (40, 0.5)
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize(
    ("name", "split"), [("toy_dev_missing_both_05.pt", "validation"), ("test_missing_x.pt", "test")]
)
def test_an_old_table_names_it_by_its_file(name, split, tmp_path):
    ((found, table),) = read_tables([legacy(tmp_path, name)], source=SOURCE).items()
    assert found == split
    assert table.describe() == "50% = 50% of samples lack something: 25% no text, 25% no image"


def test_a_typed_split_wins_and_others_stay_unread(tmp_path):
    word = "train=" + legacy(tmp_path, "test_missing_both.pt")
    assert list(read_tables([word], source=SOURCE)) == ["train"]
    assert read_tables(["train=absent.json"], source=SOURCE, only=["test"]) == {}


def test_what_does_not_fit_is_named(tmp_path):
    def refused(kind, message, *words):
        with pytest.raises(kind, match=re.escape(message)):
            read_tables(words, source=SOURCE)

    whole, short = stored(tmp_path), KEYS[:-1]
    refused(ConfigError, "is a second table for the split 'test'", whole, f"test={whole}")
    refused(DataError, "no split 'tset'", f"tset={whole}")
    refused(DataError, "absent.json is not a missing table", "absent.json")
    refused(ConfigError, "names no split", legacy(tmp_path, "plain.pt"))
    refused(ConfigError, "is for a split 'odd'", stored(tmp_path, split="odd"))
    refused(DataError, "20 rows and the split 40", "test=" + legacy(tmp_path, "s.pt", rows=20))
    refused(DataError, "1 samples are not in the missing table", stored(tmp_path, ids=short))
    refused(DataError, "first 'row-new'", stored(tmp_path, ids=[*KEYS, "row-new"]))
    refused(
        DataError, "has 41 samples, split 'test' of 'patchy' has 40", str(tmp_path / "test.json")
    )
    refused(ConfigError, "made for the data set 'other'", stored(tmp_path, dataset="other"))
    refused(DataError, "over image, audio", stored(tmp_path, modalities=("image", "audio")))
    changed = json.loads((tmp_path / "odd.json").read_text())
    (tmp_path / "odd.json").write_text(json.dumps({**changed, "patterns": [3] * NUM_ROWS}))
    refused(DataError, "its hash does not match", f"test={tmp_path / 'odd.json'}")


def values_of(*words):
    return SimpleNamespace(
        missing_table=list(words), train_split="train", missing_type="both", missing_ratio=0.5
    )


def test_the_table_of_the_training_split_takes_the_place_of_the_missing_type(tmp_path):
    word = stored(tmp_path, split="train")
    values = values_of(word)
    assert list(settle_tables(values, {"missing_table"}, SOURCE)) == ["train"]
    assert (values.missing_type, values.missing_ratio) == ("none", 0.0)  # the recipe's are gone
    assert values.missing_table == [f"train={word}"]
    with pytest.raises(ConfigError, match="--missing_ratio contradicts --missing_table"):
        settle_tables(values_of(word), {"missing_table", "missing_ratio"}, SOURCE)
    test = values_of(stored(tmp_path))
    settle_tables(test, {"missing_ratio"}, SOURCE)
    assert test.missing_ratio == 0.5


def test_a_table_of_the_scored_split_is_one_more_condition(tmp_path):
    (table,) = read_tables([stored(tmp_path)], source=SOURCE).values()
    scorer = scorer_of(model_of(), tables={"test": table})
    common = {"prior": [1, 1], "ratio": 0.5, "seed": 0, "num_resamples": 0}
    rows = {row.condition: row for row in scorer.score(split="test", **common)}
    assert list(rows)[-2:] == ["mixed", "table"]
    assert rows["table"].metrics == rows["mixed"].metrics  # the table was made by its protocol
    chosen = scorer.score(split="test", patterns=["table", "complete"], **common)
    assert [row.condition for row in chosen] == ["table", "complete"]
    with pytest.raises(ConfigError, match="name one with --missing_table validation=FILE"):
        scorer.score(split="validation", patterns=["table"], **common)


def test_the_table_checks_itself_against_ids():
    table = MissingTable(("a", "b"), (3, 1), ("image", "text"))
    table.check(["b", "a"], ("text", "image"), what="the split")
