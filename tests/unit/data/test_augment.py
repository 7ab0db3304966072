"""Changed pictures: the operations of torchvision, the chance of a keyed hash."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from mm_moe.batch import Sample
from mm_moe.data.augment import Augment, Variation, resized
from mm_moe.data.collate import Collator
from mm_moe.errors import ConfigError

FULL = {
    "random_resized_crop": [0.5, 1.0],
    "horizontal_flip": 0.5,
    "color_jitter": [0.4, 0.4, 0.4, 0.1],
    "gray": 0.3,
}


def noise(seed=0, size=(20, 30)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def same(one, other):
    return one.size == other.size and np.array_equal(np.asarray(one), np.asarray(other))


def test_nothing_happens_by_default_and_at_share_zero():
    image = noise()
    assert same(Augment()(image, key="k", size=(8, 8)), image)
    never = Augment.of({"horizontal_flip": 0, "gray": 0, "color_jitter": [0, 0, 0, 0]})
    assert same(never(image, key="k"), image)


def test_a_cut_is_torchvisions():
    image, box = noise(), (3, 4, 15, 20)
    theirs = F.resized_crop(image, 4, 3, 16, 12, [8, 8], v2.InterpolationMode.BICUBIC)
    assert same(resized(image, box, (8, 8)), theirs)


def test_flip_gray_and_colours_are_torchvisions():
    image = noise()
    flipped = Augment.of({"horizontal_flip": 1})(image, key="k")
    assert same(flipped, F.horizontal_flip(image))
    gray = Augment.of({"gray": 1})(image, key="k")
    assert same(gray, F.rgb_to_grayscale(image, num_output_channels=3))
    brighter = Augment.of({"color_jitter": {"brightness": 0.5}})
    found = [brighter(image, key=str(n)) for n in range(20)]
    means = [np.asarray(one).mean() / np.asarray(image).mean() for one in found]
    assert 0.45 < min(means) < 0.8 < 1.1 < max(means) < 1.5


def test_shares_and_cuts_have_the_distribution_of_torchvision():
    augment, image = Augment.of(FULL), noise(size=(40, 30))
    drawn = []
    for n in range(1500):
        left, top, right, bottom = augment._box(image, random.Random(n))
        drawn.append(((right - left) * (bottom - top) / 1200, (right - left) / (bottom - top)))
    theirs = [
        v2.RandomResizedCrop(8, scale=(0.5, 1.0)).make_params([torch.empty(3, 30, 40)])
        for _ in range(1500)
    ]
    expected = [(p["height"] * p["width"] / 1200, p["width"] / p["height"]) for p in theirs]
    for ours, other in zip(np.array(drawn).T, np.array(expected).T, strict=True):
        assert abs(ours.mean() - other.mean()) < 0.03
        assert abs(ours.std() - other.std()) < 0.03
    flips = [
        same(Augment.of({"horizontal_flip": 0.3})(image, key=str(n)), image) for n in range(500)
    ]
    assert 0.62 < np.mean(flips) < 0.78


def test_chance_belongs_to_seed_epoch_and_sample_and_no_generator_moves():
    def encoded(seed):
        buffer = io.BytesIO()
        noise(seed).save(buffer, "PNG")
        return buffer.getvalue()

    def batch(names, *, epoch=0, seed=0):
        variation = Variation(seed=seed, augment=Augment.of(FULL), sizes={"image": (8, 8)})
        collate = Collator(
            modalities=("image",),
            processors={"image": lambda rows: {"x": torch.tensor(np.stack(rows))}},
            problem_type="none",
            num_labels=0,
            variation=variation,
        )
        found = [Sample(name, {"image": encoded(5)}, epoch=epoch) for name in names]
        return collate(found).inputs["image"]["x"]

    torch.manual_seed(1)
    random.seed(1)
    before = torch.get_rng_state(), random.getstate()
    together = batch(["a", "b", "c"])
    after = torch.get_rng_state(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert together.shape == (3, 8, 8, 3)
    assert torch.equal(batch(["c"])[0], together[2])  # whatever else is in the batch
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(batch(["c"], epoch=1)[0], together[2])
    assert not torch.equal(batch(["c"], seed=1)[0], together[2])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"flip": 0.5}, "no 'flip'"),
        ({"horizontal_flip": 1.5}, "share between 0 and 1"),
        ({"horizontal_flip": True}, "share between 0 and 1"),
        ({"random_resized_crop": 0.9}, r"\[least, greatest\]"),
        ({"random_resized_crop": [0.0, 1.0]}, "0 < least"),
        ({"random_resized_crop": [0.5, 1.5]}, "greatest <= 1"),
        ({"ratio": [2, 1]}, "0 < least"),
        ({"color_jitter": [0.4, 0.4]}, "brightness, contrast"),
        ({"color_jitter": [0, 0, 0, 0.6]}, "hue at most 0.5"),
        ({"color_jitter": {"bright": 1}}, "no 'bright'"),
    ],
)
def test_settings_that_cannot_be(options, words):
    with pytest.raises(ConfigError, match=words):
        Augment.of(options)
