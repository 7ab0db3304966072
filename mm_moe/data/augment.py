"""Pictures changed at random in training, the same for any number of ranks and workers.

The chance of a picture is a keyed hash of (seed, epoch, sample, modality): no random generator of
the process is read or moved, and a resumed run sees what it would have seen. The operations are
those of `torchvision.transforms.v2` with its parameters drawn as there; a crop is resized as Pillow
does (bicubic, antialiased), which is what open_clip's training transform does.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as F

from mm_moe.batch import Sample
from mm_moe.data.captions import Captions
from mm_moe.errors import ConfigError
from mm_moe.registry import nearest

CROP_TRIES = 10
RATIO = (3 / 4, 4 / 3)
JITTER = ("brightness", "contrast", "saturation", "hue")
KEYS = (
    *("random_resized_crop", "ratio", "horizontal_flip"),
    *("color_jitter", "color_jitter_share", "gray"),
)


@dataclass(frozen=True)
class Augment:
    """What may happen to a picture; by default nothing.

    Attributes:
        random_resized_crop: least and greatest share of the area that is cut out and resized to the
            model's size; None: no cropping.
        ratio: least and greatest width / height of the cut.
        horizontal_flip: share of the pictures that are mirrored.
        color_jitter: strengths of brightness, contrast, saturation and hue.
        color_jitter_share: share of the pictures whose colours change.
        gray: share of the pictures that lose their colour.
    """

    random_resized_crop: tuple[float, float] | None = None
    ratio: tuple[float, float] = RATIO
    horizontal_flip: float = 0.0
    color_jitter: tuple[float, float, float, float] | None = None
    color_jitter_share: float = 1.0
    gray: float = 0.0

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Augment:
        """From a JSON object.

        Raises:
            ConfigError: an unknown name, or a number out of range.
        """
        for name in options:
            if name not in KEYS:
                raise ConfigError(f"--augment has no {name!r}; {nearest(name, list(KEYS))}")
        found: dict[str, Any] = {
            name: _share(name, options[name])
            for name in ("horizontal_flip", "color_jitter_share", "gray")
            if name in options
        }
        if "random_resized_crop" in options:
            found["random_resized_crop"] = _span(
                "random_resized_crop", options["random_resized_crop"], most=1.0
            )
        if "ratio" in options:
            found["ratio"] = _span("ratio", options["ratio"], most=math.inf)
        if "color_jitter" in options:
            found["color_jitter"] = _jitter(options["color_jitter"])
        return cls(**found)

    def __call__(
        self, image: Image.Image, *, key: str, size: tuple[int, int] | None = None
    ) -> Image.Image:
        """A changed picture.

        Args:
            image: RGB.
            key: the same key draws the same chance.
            size: width and height after a random crop; without it a picture is not cropped.
        """
        digest = hashlib.blake2b(key.encode(), digest_size=8, person=b"augment").digest()
        chance = random.Random(int.from_bytes(digest, "big"))
        if self.random_resized_crop and size:
            image = resized(image, self._box(image, chance), size)
        # every draw is made, so that one setting does not change the chance of the next
        flip, jitter, gray = chance.random(), chance.random(), chance.random()
        if flip < self.horizontal_flip:
            image = ImageOps.mirror(image)
        if self.color_jitter and jitter < self.color_jitter_share:
            image = self._recoloured(image, chance)
        if gray < self.gray:
            image = image.convert("L").convert("RGB")
        return image

    def _box(self, image: Image.Image, chance: random.Random) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of a cut: torchvision's `RandomResizedCrop`."""
        width, height = image.size
        low, high = self.random_resized_crop or (1.0, 1.0)
        logs = tuple(map(math.log, self.ratio))
        for _ in range(CROP_TRIES):
            area = width * height * chance.uniform(low, high)
            ratio = math.exp(chance.uniform(*logs))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = chance.randint(0, width - w), chance.randint(0, height - h)
                return left, top, left + w, top + h
        # the largest cut in the middle whose ratio is allowed
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def _recoloured(self, image: Image.Image, chance: random.Random) -> Image.Image:
        """As `ColorJitter` of torchvision: the four changes in a random order."""
        strengths = self.color_jitter or (0.0,) * 4
        order = list(range(4))
        chance.shuffle(order)
        for number in order:
            strength, draw = strengths[number], chance.uniform(-1, 1)
            if not strength:
                continue
            if JITTER[number] == "hue":
                image = F.adjust_hue(image, strength * draw)
            else:
                change = getattr(F, f"adjust_{JITTER[number]}")
                least = max(0.0, 1 - strength)
                image = change(image, least + (draw + 1) / 2 * (1 + strength - least))
        return image


def resized(
    image: Image.Image, box: tuple[int, int, int, int], size: tuple[int, int]
) -> Image.Image:
    """A part of a picture, bicubic and antialiased, at a size."""
    if box != (0, 0, *image.size):
        image = image.crop(box)
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Variation:
    """What differs between two looks at a sample in training: its caption and its pictures.

    Attributes:
        seed: of the run's data.
        augment: of pictures; None: they stay as they are.
        sizes: modality -> width and height that a cropped picture gets.
    """

    seed: int
    augment: Augment | None = None
    sizes: Mapping[str, tuple[int, int]] | None = None

    def caption(self, sample: Sample, captions: Captions) -> str:
        """One of the captions."""
        return captions.chosen(sample.id, seed=self.seed, epoch=sample.epoch)

    def picture(self, sample: Sample, image: Image.Image, *, modality: str) -> Image.Image:
        """The changed picture."""
        if self.augment is None:
            return image
        key = f"{self.seed}/{sample.epoch}/{modality}/{sample.id}"
        return self.augment(image, key=key, size=(self.sizes or {}).get(modality))


def _share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"--augment {name} is {value!r}; it is a share between 0 and 1.")
    return float(value)


def _span(name: str, value: Any, *, most: float) -> tuple[float, float]:
    good = isinstance(value, list | tuple) and len(value) == 2
    if not good or not all(isinstance(v, int | float) for v in value):
        raise ConfigError(f"--augment {name} is {value!r}; it is [least, greatest].")
    low, high = map(float, value)
    if not 0 < low <= high <= most:
        rule = "0 < least <= greatest" + (f" <= {most:g}" if math.isfinite(most) else "")
        raise ConfigError(f"--augment {name} is {value!r}; it must be {rule}.")
    return low, high


def _jitter(value: Any) -> tuple[float, float, float, float]:
    if isinstance(value, Mapping):
        for name in value:
            if name not in JITTER:
                hint = nearest(str(name), list(JITTER))
                raise ConfigError(f"--augment color_jitter has no {name!r}; {hint}")
        value = [value.get(name, 0.0) for name in JITTER]
    good = isinstance(value, list | tuple) and len(value) == len(JITTER)
    if not good or not all(isinstance(v, int | float) and v >= 0 for v in value) or value[3] > 0.5:
        raise ConfigError(
            f"--augment color_jitter is {value!r}; it is [brightness, contrast, saturation, hue], "
            "numbers from 0, hue at most 0.5."
        )
    first, second, third, fourth = map(float, value)
    return first, second, third, fourth
