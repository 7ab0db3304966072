import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mm_moe.data.sets.emoji import EmojiData
from mm_moe.data.sets.openclipart import MAX_SHARED_TITLE, OpenclipartEmojiData, caption
from mm_moe.data.streaming import SampleStream
from mm_moe.errors import ConfigError, DataError


def test_caption():
    shared = frozenset({"icon set"})
    assert caption(" Red \n apple", ["fruit"], shared=shared) == "Red apple"
    assert caption("", ["red_fruit", "apple"], shared=shared) == "red fruit apple"
    assert caption("icon set", ["apple"], shared=shared) == "apple"
    assert caption("icon set", [], shared=shared) == "icon set"
    assert caption(None, None, shared=shared) == ""


@pytest.fixture
def folder(tmp_path, png):
    """60 drawings in the real layout: 25 of one collection, one without any words."""
    cell = {"bytes": png((1, 2, 3)), "path": None}
    rows = [
        {"id": f"d{n}", "image": cell, "title": f"thing {n}", "keywords": ["k"]} for n in range(34)
    ]
    rows += [
        {"id": f"c{n}", "image": cell, "title": "set", "keywords": ["colour", str(n)]}
        for n in range(MAX_SHARED_TITLE + 5)
    ]
    rows += [{"id": "bare", "image": cell, "title": "", "keywords": []}]
    (tmp_path / "openclipart").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "openclipart" / "openclipart.parquet")
    return tmp_path


def texts(source, split):
    stream = SampleStream(source, split=split, batch_size=1, epochs=1)
    return {sample.id: sample.payload.get("text") for sample in stream}


def test_pairs_of_both_sets_and_disjoint_splits(folder):
    source = OpenclipartEmojiData(str(folder))
    train, validation = texts(source, "train"), texts(source, "validation")
    assert (len(train), len(validation)) == (source.size("train"), source.size("validation"))
    assert len(train) + len(validation) == 60 + EmojiData().size("train")
    everything = {**train, **validation}
    assert everything["d3"] == "thing 3"
    assert everything["c3"] == "colour 3"
    assert everything["bare"] is None
    assert validation
    assert not any("/" in sample_id for sample_id in validation)  # no emoji is held out here
    assert not set(train.values()) & set(validation.values())


def test_no_emoji_of_the_emoji_task_is_trained_on(folder):
    emojis = {i for i in texts(OpenclipartEmojiData(str(folder)), "train") if "/" in i}
    held_out = set(texts(EmojiData(), "test")) | set(texts(EmojiData(), "validation"))
    assert emojis
    assert not emojis & held_out


def test_shuffle_mixes_the_two_sets(folder):
    source = OpenclipartEmojiData(str(folder))
    stream = SampleStream(
        source, split="train", batch_size=1, epochs=1, shuffle_buffer=2000, seed=1
    )
    ids = [sample.id for sample in stream]
    assert len(set(ids)) == len(ids) == source.size("train")
    half = ids[: len(ids) // 2]
    drawings = sum("/" not in i for i in ids)
    assert 0 < sum("/" not in i for i in half) < drawings


def test_errors(tmp_path):
    with pytest.raises(ConfigError, match="needs data_dir"):
        OpenclipartEmojiData()
    with pytest.raises(DataError, match=r"must hold openclipart.parquet"):
        OpenclipartEmojiData(str(tmp_path))
