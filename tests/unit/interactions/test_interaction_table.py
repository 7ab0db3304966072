"""The table of categories as a file: what comes back, and what is refused."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from mm_moe.data.interactions.table import InteractionTable, check_covers, table_of
from mm_moe.errors import DataError


def table(**changes):
    nothing = np.full((1, 2), np.nan)
    fields = {
        "dataset": "toy",
        "label_names": ("no", "yes"),
        "ids": ("a", "b", "c", "d"),
        "splits": ("train", "train", "train", "test"),
        "label_N": np.array([1, 1, 0, 0]),
        "predictions": {"text": np.array([1, 0, -1, 1]), "image": np.array([1, 1, 0, 1])},
        "probabilities": {
            "text": np.concatenate([[[0.2, 0.8], [0.9, 0.1]], nothing, [[0.3, 0.7]]]),
            "image": np.array([[0.4, 0.6], [0.1, 0.9], [0.5, 0.5], [0.0, 1.0]]),
        },
        "origin": {"labeller": "hand"},
    }
    return table_of(**fields | changes)


def test_what_is_saved_comes_back(tmp_path):
    made = table()
    made.save(tmp_path / "t.parquet")
    found = InteractionTable.load(tmp_path / "t.parquet")
    assert found.names == ("R", "U_text", "U_image", "AS", "DS")
    assert found.code_N.tolist() == [0, 2, -1, 3]
    assert found.coarse_N.tolist() == [0, 1, -1, 2]
    assert (found.ids, found.splits, found.origin) == (made.ids, made.splits, made.origin)
    assert found.soft_NQ == pytest.approx(made.soft_NQ, nan_ok=True)
    assert found.probabilities["text"] == pytest.approx(made.probabilities["text"], nan_ok=True)
    columns = pq.read_table(tmp_path / "t.parquet").to_pydict()
    assert columns["category"] == ["R", "U_image", None, "AS"]
    assert columns["soft"][2] is None


def test_codes_for_training_are_those_of_one_split():
    assert table().training_codes("train") == {"a": 0, "b": 1, "c": -100}
    assert table().training_codes("train", fine=True) == {"a": 0, "b": 2, "c": -100}


def test_a_sample_that_the_table_lacks_is_named():
    check_covers(table(), ["a", "b"], split="train")
    with pytest.raises(DataError, match=r"2 of 3 samples of split 'train' .* first 'd', 'x'"):
        check_covers(table(), ["a", "d", "x"], split="train")


def test_tables_that_cannot_be(tmp_path):
    with pytest.raises(DataError, match="'a' twice"):
        table(ids=("a", "b", "a", "d"))
    with pytest.raises(DataError, match="no interaction table"):
        InteractionTable.load(tmp_path / "none.parquet")
    made = table()
    made.code_N[0] = 3
    made.save(tmp_path / "t.parquet")
    with pytest.raises(DataError, match="category of sample 'a' does not follow"):
        InteractionTable.load(tmp_path / "t.parquet")
    pq.write_table(pq.read_table(tmp_path / "t.parquet", columns=["id"]), tmp_path / "u.parquet")
    with pytest.raises(DataError, match="is no interaction table"):
        InteractionTable.load(tmp_path / "u.parquet")
