import io

import pytest
from PIL import Image

from mm_moe.batch import Sample
from mm_moe.data.chance import draws, split_of
from mm_moe.data.embedded import make_emoji
from mm_moe.data.sets.emoji import EMBEDDED, EmojiData
from mm_moe.data.streaming import SampleStream
from mm_moe.errors import DataError


def rows(count, *, category="A", vendors=("x", "y"), image=None):
    return [
        {
            "id": f"{vendor}/{category}{n}",
            "image": {"bytes": image, "path": None},
            "text": f"name {n}",
            "category": category,
            "vendor": vendor,
            "unified": f"{category}{n}",
        }
        for n in range(count)
        for vendor in vendors
    ]


def test_choice_is_by_hash_and_keeps_whole_emojis():
    chosen = make_emoji.choose(rows(6) + rows(2, category="B"), limit=3)
    codes = {row["unified"] for row in chosen}
    place = {f"A{n}": draws(f"A{n}", purpose="choice", dataset="emoji")[0] for n in range(6)}
    assert codes == {*sorted(place, key=place.get)[:3], "B0", "B1"}
    assert len(chosen) == 2 * len(codes)  # both drawings of each
    assert make_emoji.choose(rows(6)[::-1], limit=3) == make_emoji.choose(rows(6), limit=3)
    shares = {"train": 0.6, "validation": 0.15, "test": 0.25}
    for row in chosen:
        assert row["split"] == split_of(row["unified"], dataset="emoji", shares=shares)


def test_the_embedded_file():
    source = EmojiData()
    assert source.path.stat().st_size < 7_000_000
    assert {split: source.size(split) for split in source.splits()} == {
        "train": 1518,
        "validation": 356,
        "test": 658,
    }
    assert list(source.label_names) == sorted(source.label_names)
    seen = {}
    for split in source.splits():
        samples = list(SampleStream(source, split=split, batch_size=8, epochs=1))
        assert len(samples) == source.size(split)
        assert {sample.label for sample in samples} == set(range(9))
        seen[split] = {sample.id.split("/")[1] for sample in samples}
        assert len(seen[split]) == len(samples) / 2  # two drawings of every emoji, in one split
    assert sum(map(len, seen.values())) == len(set.union(*seen.values())) == 1266


def test_an_embedded_sample():
    sample = next(iter(SampleStream(EmojiData(), split="train", batch_size=1)))
    image = Image.open(io.BytesIO(sample.payload["image"]))
    assert (image.format, image.size) == ("PNG", (64, 64))
    assert sample.payload["text"]
    assert sample.id.startswith(("google/", "twitter/"))


@pytest.fixture
def full(tmp_path, png):
    """A small set in the full layout."""
    make_emoji.write(
        make_emoji.choose(rows(40, category="Flags", image=png((1, 2, 3)))),
        tmp_path / "emoji.parquet",
    )
    return tmp_path


def test_the_full_set_from_a_folder(full):
    source = EmojiData(str(full))
    assert sum(source.size(split) for split in source.splits()) == 80
    for split in source.splits():
        samples = list(SampleStream(source, split=split, batch_size=8, epochs=1))
        assert len(samples) == source.size(split)
        assert all(make_emoji.emoji_split(sample.id.split("/")[1]) == split for sample in samples)
    assert source.fingerprint() != EmojiData().fingerprint()
    nested = full / "up" / "emoji"
    nested.mkdir(parents=True)
    (full / "emoji.parquet").rename(nested / "emoji.parquet")
    assert EmojiData(str(full / "up")).size("train") == source.size("train")


def test_the_recipe_writes_what_the_adapter_reads(full, tmp_path, caplog):
    output = tmp_path / "out.parquet"
    make_emoji.main(["--source", str(full), "--output", str(output)])
    again = tmp_path / "again.parquet"
    make_emoji.main(["--source", str(full), "--output", str(again)])
    assert output.read_bytes() == again.read_bytes()
    with pytest.raises(DataError, match="give the folder that holds"):
        make_emoji.main(["--source", str(tmp_path / "absent")])


def test_errors(tmp_path):
    with pytest.raises(DataError, match=r"there is no .*emoji.parquet"):
        EmojiData(str(tmp_path))
    with pytest.raises(DataError, match="no split 'dev'; it has: train, validation, test"):
        EmojiData().stream("dev")
    row = {**rows(1)[0], "category": "Flag"}
    with pytest.raises(DataError, match=r"'x/A0' has the label 'Flag'.*did you mean Flags"):
        EmojiData().to_sample(row)


def test_the_notice_names_every_licence():
    notice = EMBEDDED.with_name("NOTICE.txt").read_text()
    for words in ("Cal Henderson", "The MIT License", "Apache License, Version 2.0", "CC-BY 4.0"):
        assert words in notice


def test_the_drawings_of_an_emoji_are_a_group_with_masks_of_their_own():
    samples = list(SampleStream(EmojiData(), split="validation", batch_size=8, epochs=1))
    assert {sample.mask_key == sample.id for sample in samples} == {True}
    groups = {sample.group_key for sample in samples}
    assert len(groups) == 178
    assert {sample.id.split("/")[1] for sample in samples} == groups


def test_a_mask_follows_the_group_unless_it_is_named():
    assert Sample("a").mask_key == Sample("a").group_key == "a"
    assert Sample("a", group="g").mask_key == "g"
    assert Sample("a", group="g", mask_key="a").mask_key == "a"
