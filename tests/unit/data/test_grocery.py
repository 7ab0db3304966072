import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mm_moe.data.sets.grocery import GroceryData, class_words, mask
from mm_moe.data.streaming import SampleStream
from mm_moe.errors import ConfigError, DataError


def test_class_words_are_masked_in_every_form():
    words = class_words(["Passion-Fruit", "Tomatoes", "Pear", "R-Milk"])
    assert words == {"passion", "fruit", "tomatoe", "pear", "milk"}
    assert (
        mask("Passion fruit's PEARS, a Pear or tomatoes: fruitful.", words)
        == "item item item, a item or item: fruitful."
    )


@pytest.fixture
def folder(tmp_path, png):
    classes = [
        {"fine": 0, "name": "Red-Pear", "coarse_name": "Pear", "description": "A red pear, juicy."},
        {"fine": 1, "name": "Gala", "coarse_name": "Apple", "description": "Gala is sweet."},
    ]
    photos = [
        {
            "id": f"{split}/{n}",
            "split": split,
            "image": {"bytes": png((n, 0, 0)), "path": None},
            "fine": n % 2,
            "coarse": n % 2,
        }
        for split, count in {"train": 4, "val": 1, "test": 2}.items()
        for n in range(count)
    ]
    (tmp_path / "grocery").mkdir()
    pq.write_table(pa.Table.from_pylist(classes), tmp_path / "grocery" / "classes.parquet")
    pq.write_table(pa.Table.from_pylist(photos), tmp_path / "grocery" / "photos.parquet")
    return tmp_path


def test_photos_with_the_masked_text_of_their_class(folder):
    source = GroceryData(str(folder))
    assert source.label_names == ("Apple", "Pear")
    assert [source.size(split) for split in source.splits()] == [4, 1, 2]
    samples = list(SampleStream(source, split="test", batch_size=1, epochs=1))
    assert [(s.id, s.payload["text"], s.label) for s in samples] == [
        ("test/0", "A item item, juicy.", 1),
        ("test/1", "item is sweet.", 0),
    ]
    assert GroceryData(str(folder / "grocery")).fingerprint() == source.fingerprint()


def test_errors(folder):
    with pytest.raises(ConfigError, match="needs data_dir"):
        GroceryData()
    with pytest.raises(DataError, match=r"fine class 7, which classes.parquet does not list"):
        GroceryData(str(folder)).to_sample({"id": "x", "fine": 7, "image": None})
    (folder / "grocery" / "classes.parquet").unlink()
    with pytest.raises(DataError, match=r"must hold classes.parquet"):
        GroceryData(str(folder))
