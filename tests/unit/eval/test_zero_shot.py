"""Zero-shot scores by hand."""

import csv

import numpy as np
import pytest

from eval.zero_shot import (
    ZeroShotRow,
    class_samples,
    classification,
    format_rows,
    ranks_of,
    read_templates,
    retrieval,
    retrieval_chance,
    write_csv,
)
from mm_moe.batch import TEXT
from mm_moe.errors import ConfigError, DataError


def unit(*rows) -> np.ndarray:
    found = np.array(rows, dtype=np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_rank_counts_wrong_keys_that_are_at_least_as_near():
    keys = unit([1, 0], [0, 1], [1, 1])
    # query (1, 0): nearest is key 0, then 2, then 1
    places = [ranks_of(unit([1, 0]), keys, np.array([g]), np.array([0, 1, 2]))[0] for g in range(3)]
    assert places == [0, 2, 1]


def test_a_constant_feature_finds_nothing():
    same = unit(*[[1, 1]] * 12)
    metrics = retrieval(same, same, [str(n) for n in range(12)])
    assert metrics["text_retrieval_recall@1"] == metrics["image_retrieval_recall@10"] == 0


def test_equal_captions_are_one_text_with_several_images():
    image = unit([1, 0], [0.9, 0.1], [0, 1])
    text = unit([1, 0], [1, 0], [0, 1])
    metrics = retrieval(image, text, ["cat", "cat", "dog"])
    assert metrics["text_retrieval_recall@1"] == metrics["image_retrieval_recall@1"] == 1
    # with the pictures of cat and dog swapped, no text finds its picture first, and no picture its
    # text; of two texts, the second place is right for all
    metrics = retrieval(image[[2, 2, 0]], text, ["cat", "cat", "dog"])
    assert metrics["text_retrieval_recall@1"] == metrics["image_retrieval_recall@1"] == 0
    assert metrics["text_retrieval_recall@5"] == metrics["image_retrieval_recall@5"] == 1


def test_many_queries_are_scored_in_parts(monkeypatch):
    rng = np.random.default_rng(0)
    image, text = unit(*rng.normal(size=(50, 4))), unit(*rng.normal(size=(50, 4)))
    captions = [str(n % 30) for n in range(50)]
    whole = retrieval(image, text, captions)
    monkeypatch.setattr("eval.zero_shot.CHUNK", 7)
    assert retrieval(image, text, captions) == whole


def test_agrees_with_clip_benchmark_on_one_caption_per_image():
    """Its definition: the right image is among the k nearest of a text."""
    rng = np.random.default_rng(1)
    image, text = unit(*rng.normal(size=(40, 8))), unit(*rng.normal(size=(40, 8)))
    metrics = retrieval(image, text, [str(n) for n in range(40)])
    nearest = np.argsort(-(text @ image.T), axis=1)
    for k in (1, 5, 10):
        hits = [row in nearest[row, :k] for row in range(40)]
        assert metrics[f"image_retrieval_recall@{k}"] == pytest.approx(np.mean(hits))


def test_nothing_to_retrieve():
    with pytest.raises(DataError, match="both an image and a text"):
        retrieval(np.zeros((0, 2)), np.zeros((0, 2)), [])


def test_chance_of_retrieval_by_hand():
    chance = retrieval_chance(["a", "a", "b", "c"])
    assert chance["text_retrieval_recall@1"] == pytest.approx(1 / 3)
    # a: 2 of 4 images, b and c: 1 of 4
    assert chance["image_retrieval_recall@1"] == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3)
    assert chance["image_retrieval_recall@5"] == 1


def test_classification_by_hand():
    classes = unit([1, 0, 0], [0, 1, 0], [0, 0, 1])
    images = unit([3, 1, 0], [2, 1, 0], [1, 2, 0], [0, 0, 1])
    metrics = classification(images, classes, np.array([0, 1, 1, 2]))
    assert metrics == {"acc1": 0.75, "mean_per_class_recall": pytest.approx((1 + 0.5 + 1) / 3)}
    assert classification(images, unit(*[[1, 1, 1]] * 3), np.array([0, 1, 1, 2]))["acc1"] == 0


def test_acc5_needs_more_than_five_classes():
    classes = unit(*np.eye(6))
    images = unit([6, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1])
    metrics = classification(images, classes, np.array([4, 5]))
    assert metrics["acc1"] == 0
    assert metrics["acc5"] == 0.5


def test_class_names_in_templates():
    samples = class_samples(["hot_dog", "{}"], ["a {}", "the {}."])
    assert [s.payload[TEXT] for s in samples] == ["a hot dog", "the hot dog.", "a {}", "the {}."]
    assert [s.id for s in samples] == sorted(s.id for s in samples)


@pytest.mark.parametrize("text", ["", "\n \n", "a photo", "a {} and {}"])
def test_templates_that_cannot_be(tmp_path, text):
    file = tmp_path / "templates.txt"
    file.write_text(text)
    with pytest.raises(ConfigError, match="zero_shot_templates"):
        read_templates(str(file))


def test_templates_of_a_file(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("a {}\n\n the {}. \n")
    assert read_templates(str(file)) == ("a {}", "the {}.")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_templates(str(tmp_path / "none.txt"))


def test_rows_as_text_and_table(tmp_path):
    rows = [
        ZeroShotRow("emoji", "zeroshot_retrieval", 9, {"text_retrieval_recall@1": 0.5}, {}),
        ZeroShotRow("emoji", "zeroshot_classification", 9, {"acc1": 0.25}, {"acc1": 0.1}),
    ]
    assert "25.0    10.0" in format_rows(rows)
    write_csv(rows, tmp_path / "scores.csv", model="run", pretrained="none")
    with (tmp_path / "scores.csv").open() as stream:
        table = list(csv.DictReader(stream))
    assert [row["task"] for row in table] == ["zeroshot_retrieval", "zeroshot_classification"]
    assert (table[0]["acc1"], table[1]["acc1"]) == ("", "0.25")
