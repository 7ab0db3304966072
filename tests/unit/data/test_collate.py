import logging
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from toy import Numbers

from mm_moe.batch import IGNORED_LABEL, Sample
from mm_moe.data.collate import Collator
from mm_moe.data.missing import MissingProtocol
from mm_moe.data.table import MissingTable
from mm_moe.errors import ConfigError, DataError

TWO = ("image", "text")


def images(rows):
    return {"pixel_values": torch.tensor([row.getpixel((0, 0)) for row in rows])}


def texts(rows):
    return {"input_ids": torch.tensor([[len(row)] for row in rows])}


def collator(**options):
    defaults = {
        "modalities": TWO,
        "processors": {"image": images, "text": texts},
        "problem_type": "single_label_classification",
        "num_labels": 3,
        "missing": None,
    }
    return Collator(**{**defaults, **options})


def test_packs_the_present_rows_in_order(png):
    batch = collator()(
        [
            Sample("a", {"image": png((1, 0, 0)), "text": "x"}, 0),
            Sample("b", {"text": "xx"}, 1),  # image absent by nature
            Sample("c", {"image": png((3, 0, 0)), "text": None}, 2),
            Sample("d", {"image": b"", "text": "  "}, 2),  # empty and blank are absent, too
        ]
    )
    assert batch.ids == ["a", "b", "c", "d"]
    assert batch.present.tolist() == [[True, True], [False, True], [True, False], [False, False]]
    assert batch.inputs["image"]["pixel_values"].tolist() == [[1, 0, 0], [3, 0, 0]]
    assert batch.inputs["text"]["input_ids"].tolist() == [[1], [2]]
    assert batch.labels.tolist() == [0, 1, 2, IGNORED_LABEL]  # nothing left of d


def test_a_modality_without_rows_has_no_entry():
    batch = collator()([Sample("a", {"text": "x"}, 0)])
    assert list(batch.inputs) == ["text"]


def test_an_empty_list_is_a_batch_of_no_rows():
    batch = collator(missing=MissingProtocol(dataset="d", split="s", kind="both", ratio=1.0))([])
    assert batch.ids == []
    assert batch.present.shape == (0, 2)
    assert batch.inputs == {}
    assert batch.labels.shape == (0,)


def test_the_mask_deletes_before_decoding():
    # The taken image is no image: were it touched, it would be counted as bad.
    missing = MissingTable(("a", "b"), (2, 1), TWO)  # a: no image, b: no text
    collate = collator(missing=missing, max_bad_samples=0)
    batch = collate([Sample("a", {"image": b"not an image", "text": "x"}, 0)])
    assert batch.present.tolist() == [[False, True]]
    assert collate.bad_ids == []


def test_the_mask_never_takes_the_last_modality(png):
    missing = MissingTable(("a", "b"), (2, 1), TWO)
    batch = collator(missing=missing)(
        [Sample("a", {"image": png((1, 0, 0))}, 0), Sample("b", {"text": "x"}, 1)]
    )
    assert batch.present.tolist() == [[True, False], [False, True]]
    assert batch.labels.tolist() == [0, 1]


def test_bad_images_are_counted_named_once_and_go_on(png, noise_png, caplog):
    collate = collator()
    samples = [
        Sample("bad", {"image": noise_png[:200], "text": "secret words"}, 0),
        Sample("lone", {"image": b"hello"}, 1),
        Sample("good", {"image": png((5, 0, 0)), "text": "xx"}, 2),
    ]
    with caplog.at_level(logging.WARNING, logger="mm_moe.data"):
        collate(samples)
        batch = collate(samples)
    assert batch.present.tolist() == [[False, True], [False, False], [True, True]]
    assert batch.labels.tolist() == [0, IGNORED_LABEL, 2]
    assert batch.inputs["image"]["pixel_values"].tolist() == [[5, 0, 0]]
    assert collate.bad_ids == ["bad", "lone"]
    assert collate.num_bad == 2
    assert [record.message.count("'bad'") for record in caplog.records] == [1, 0]
    assert "secret" not in caplog.text


def test_too_many_bad_images_stop_the_run():
    collate = collator(max_bad_samples=2)
    collate([Sample(str(n), {"image": b"x", "text": "t"}, 0) for n in range(2)])
    with pytest.raises(DataError, match=r"3 samples .* \(2\); the last one is '2'"):
        collate([Sample("2", {"image": b"x", "text": "t"}, 0)])


class BadNumbers(Numbers):
    modalities = ("image",)

    def to_sample(self, row):
        return Sample(row["id"], {"image": Path("/nowhere") / row["id"]}, 0)


def test_bad_images_are_counted_across_loader_workers(tmp_path):
    source = BadNumbers.write(tmp_path, rows=6)
    from mm_moe.data.streaming import SampleStream

    collate = collator(modalities=("image",), processors={"image": images})
    stream = SampleStream(source, split="train", batch_size=1, epochs=2)
    assert len(list(DataLoader(stream, batch_size=1, num_workers=2, collate_fn=collate))) == 12
    assert collate.num_bad == 6  # each id once, though two workers met it in two epochs


def test_labels_of_every_problem_type():
    rows = [Sample("a", {"text": "x"}, [1, 0, 1]), Sample("b", {"text": "x"}, None)]
    labels = collator(problem_type="multi_label_classification")(rows).labels
    assert labels.tolist() == [[1.0, 0.0, 1.0], [IGNORED_LABEL] * 3]
    rows = [Sample("a", {"text": "x"}, 0.5), Sample("b", {"text": "x"}, None)]
    assert collator(problem_type="regression").__call__(rows).labels.tolist() == [0.5, -100.0]
    assert collator(problem_type="none")(rows).labels is None


@pytest.mark.parametrize(
    ("problem_type", "label", "words"),
    [
        ("single_label_classification", 3, "is 3, outside the 3 classes 0 to 2"),
        ("single_label_classification", -1, "is -1, outside"),
        ("single_label_classification", 1.0, "class index, not float"),
        ("single_label_classification", True, "class index, not bool"),
        ("multi_label_classification", [1, 0], "list of 3 zeros and ones"),
        ("multi_label_classification", [1, 0, 2], "list of 3 zeros and ones"),
        ("regression", float("nan"), "is nan"),
        ("regression", -100.0, "marks rows without a label"),
    ],
)
def test_labels_outside_their_classes(problem_type, label, words):
    with pytest.raises(DataError, match=f"'a' .*{words}|'a'.*{words}"):
        collator(problem_type=problem_type)([Sample("a", {"text": "x"}, label)])


def test_unknown_problem_type_and_lacking_processor():
    with pytest.raises(ConfigError, match="did you mean regression"):
        collator(problem_type="regresion")([Sample("a", {"text": "x"}, 0)])
    with pytest.raises(ConfigError, match="no processor for text"):
        collator(processors={"image": images})
