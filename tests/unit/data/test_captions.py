"""Captions: which one a step sees, and which one evaluation sees."""

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mm_moe.batch import Sample
from mm_moe.data.augment import Variation
from mm_moe.data.captions import Captions, caption_rule
from mm_moe.data.collate import Collator
from mm_moe.data.sets.columns import ColumnsData
from mm_moe.data.streaming import SampleStream
from mm_moe.errors import ConfigError


def collator(variation=None):
    return Collator(
        modalities=("text",),
        processors={"text": lambda rows: {"texts": rows}},
        problem_type="none",
        num_labels=0,
        variation=variation,
    )


def test_cells_become_one_text_several_or_none():
    rule = caption_rule({"a": 3, "b": 1})
    assert rule.payload({"a": "x", "b": None}) == "x"
    assert rule.payload({"a": "", "b": float("nan")}) is None
    assert rule.payload({"a": ["x", "y"], "b": "z"}) == Captions(("x", "y", "z"), (1.5, 1.5, 1))
    assert rule.payload({"a": "x", "b": b"caf\xe9"}) == "x"
    assert rule.payload({"a": b"caf\xe9"}) == b"caf\xe9"  # the collator counts it
    assert caption_rule("a", join=", ").payload({"a": ["x", "y"]}) == "x, y"
    framed = caption_rule("a", templates=["{}", "a {}."]).payload({"a": "x"})
    assert framed == Captions(("x",), (1.0,), ("{}", "a {}."))
    assert framed.first == "x"


def test_choice_follows_the_weights_and_changes_with_the_epoch():
    captions = Captions(("x", "y"), (3, 1))
    drawn = Counter(captions.chosen(str(n), seed=0, epoch=0) for n in range(2000))
    assert 0.71 < drawn["x"] / 2000 < 0.79
    epochs = [captions.chosen("one", seed=0, epoch=epoch) for epoch in range(50)]
    assert set(epochs) == {"x", "y"}
    assert epochs == [captions.chosen("one", seed=0, epoch=epoch) for epoch in range(50)]
    assert epochs != [captions.chosen("one", seed=1, epoch=epoch) for epoch in range(50)]


def test_training_chooses_and_evaluation_takes_the_first():
    sample = Sample("s", {"text": Captions(("x", "y"), (1, 1), ("{}!",))})
    assert collator()([sample]).inputs["text"]["texts"] == ["x!"]
    seen = {
        collator(Variation(seed=0))([Sample("s", sample.payload, epoch=epoch)]).inputs["text"][
            "texts"
        ][0]
        for epoch in range(20)
    }
    assert seen == {"x!", "y!"}


def test_columns_with_several_captions_and_without_labels(tmp_path):
    rows = {"id": ["1", "2", "3"], "alt": ["a", None, ""], "made": [["b", "c"], ["d"], []]}
    pq.write_table(pa.table(rows), tmp_path / "train.parquet")
    source = ColumnsData(str(tmp_path), text_column=["alt", "made"], id_column="id")
    assert (source.problem_type, source.modalities) == ("none", ("text",))
    found = list(SampleStream(source, split="train", batch_size=1, epochs=1))
    texts = [sample.payload.get("text") for sample in found]
    assert texts == [Captions(("a", "b", "c"), (1, 0.5, 0.5)), "d", None]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"columns": {"a": -1}}, "'a' the weight -1"),
        ({"columns": {"a": True}}, "weight True"),
        ({"columns": []}, "names no column"),
        ({"columns": "a", "templates": ["no place"]}, "must have one {}"),
    ],
)
def test_rules_that_cannot_be(options, words):
    with pytest.raises(ConfigError, match=words):
        caption_rule(options.pop("columns"), **options)
