import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mm_moe.data.collate import Collator
from mm_moe.data.decode import Region, UndecodableImageError, decode_image
from mm_moe.data.sets.nlvr import NlvrData

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def picture(order) -> bytes:
    """Three boxes of 100 pixels with 50 between them, as published."""
    array = np.full((100, 400, 3), 200, np.uint8)
    for place, colour in enumerate(order):
        array[:, place * 150 : place * 150 + 100] = COLOURS[colour]
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def source(tmp_path):
    for table in ("dev", "test", "hidden"):
        names = [f"{n}-{k}" for n in range(6) for k in range(2)]
        about = {
            "identifier": names,
            "sentence": [f"There is {name}" for name in names],
            "label": ["true", "false"] * 6,
            "directory": [""] * 12,
        }
        pq.write_table(pa.table(about), tmp_path / f"{table}.parquet")
        images = {
            "identifier": [name for name in names for _ in range(2)],
            "permutation": [0, 1] * 12,
            "image": [
                {"bytes": picture(o), "path": ""} for _ in names for o in ((0, 1, 2), (2, 0, 1))
            ],
        }
        pq.write_table(pa.table(images), tmp_path / f"{table}_images.parquet")
    return NlvrData(str(tmp_path))


def samples(source, split):
    return [source.to_sample(row) for row in source.stream(split)]


def test_each_box_is_an_image(source):
    first, second = samples(source, "test")[:2]
    assert (first.id, second.id, first.label) == ("dev-0-0-0", "dev-0-0-1", 1)
    assert first.mask_key == second.mask_key == "dev-0-0"
    for sample, order in ((first, (0, 1, 2)), (second, (2, 0, 1))):
        for n, colour in enumerate(order):
            box = np.asarray(decode_image(sample.payload[f"image_{n}"]))
            assert box.shape == (100, 100, 3)
            assert (box == COLOURS[colour]).all()


def test_dev_tests_and_presentations_stay_together(source):
    ids = {split: {s.id for s in samples(source, split)} for split in source.splits()}
    assert {i.split("-")[0] for i in ids["test"]} == {"dev"}
    heads = {s: {tuple(i.split("-")[:2]) for i in found} for s, found in ids.items()}
    assert not heads["train"] & heads["validation"]
    assert sum(map(len, ids.values())) == 3 * 24


def test_a_taken_box_is_not_decoded_and_a_broken_picture_is_missing(source):
    sample = samples(source, "test")[0]
    broken = Region(b"no image", (0, 0, 100, 100))
    twin = type(sample)(sample.id, {**sample.payload, "image_1": broken}, sample.label)
    sizes = lambda images: {"size": [image.size for image in images]}  # noqa: E731
    collate = Collator(
        modalities=source.modalities,
        processors=dict.fromkeys(source.modalities, sizes) | {"text": lambda texts: {"n": texts}},
        problem_type=source.problem_type,
        num_labels=2,
    )
    batch = collate([sample, twin])
    assert batch.present.tolist() == [[True] * 4, [True, False, True, True]]
    assert collate.bad_ids == [twin.id]


def test_a_box_outside_the_picture_does_not_decode():
    with pytest.raises(UndecodableImageError, match="400 x 100"):
        decode_image(Region(picture((0, 1, 2)), (350, 0, 450, 100)))
