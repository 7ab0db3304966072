"""AV-MNIST as the arrays that MultiBench and I2M2 publish.

Layout: `image/{train,test}_data.npy` float (N, 784), `audio/{train,test}_data.npy` (N, 112, 112)
and `{train,test}_labels.npy` (N,). The last twelfth of the training rows (55,000 to 59,999 of
60,000) is the validation split. Both modalities are divided by 255.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mm_moe.data.prepare.av_mnist import PIXEL, SIDE, VALIDATION_PART
from mm_moe.data.prepare.raw import ARRAYS, SPLITS, RawDataSet, RawRow
from mm_moe.data.schema import SINGLE_LABEL
from mm_moe.errors import DataError


class AvMnistNpyRaw(RawDataSet):
    """The published folder.

    Raises:
        DataError: an array is missing, has another shape, or another number of rows.
    """

    name = "avmnist_npy"
    problem_type = SINGLE_LABEL
    task = SINGLE_LABEL
    license = "MNIST CC BY-SA 3.0; Free Spoken Digit Dataset CC BY-SA 4.0; ESC-50 CC BY-NC 3.0"
    notes = (
        "The generator may have written spectrograms in another order than labels.",
        "Components of training and test images were fitted apart.",
    )

    def __init__(self, source: Path) -> None:
        super().__init__(source)
        self.kinds = {"image": ARRAYS, "audio": ARRAYS}
        self.scales = {"image": PIXEL, "audio": PIXEL}
        self.label_names = tuple(map(str, range(10)))
        self.paths = {
            part: {
                "image": self.need("image", f"{part}_data.npy"),
                "audio": self.need("audio", f"{part}_data.npy"),
                "label": self.need(f"{part}_labels.npy"),
            }
            for part in ("train", "test")
        }

    def splits(self) -> tuple[str, ...]:
        """Train, validation and test."""
        return SPLITS

    def indices(self) -> list[Path]:
        """The six arrays."""
        return [path for paths in self.paths.values() for path in paths.values()]

    def rows(self, split: str) -> Iterator[RawRow]:
        """Rows in the published order; the id is the row number."""
        part = "test" if split == "test" else "train"
        found = _arrays(self.paths[part])
        count = len(found["label"])
        last = count - count // VALIDATION_PART
        span = {"train": (0, last), "validation": (last, count), "test": (0, count)}[split]
        for n in range(*span):
            image = np.asarray(found["image"][n], dtype=np.float32).reshape(SIDE, SIDE)
            audio = np.asarray(found["audio"][n])
            yield RawRow(f"{part}-{n:05d}", {"image": image, "audio": audio}, _label(found, n))


def _label(found: dict[str, np.ndarray], n: int) -> int | None:
    value = float(found["label"][n])
    return int(value) if value.is_integer() else None


def _arrays(paths: dict[str, Path]) -> dict[str, np.ndarray]:
    """The three arrays of a part, on disk, checked against each other."""
    found = {}
    for name, path in paths.items():
        try:
            found[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path} is no plain .npy array of numbers.") from error
    count = len(found["label"])
    wanted = {"image": (count, SIDE**2), "audio": (count, *found["audio"].shape[1:])}
    for name, array in found.items():
        right = array.shape == wanted.get(name, (count,)) and array.dtype.kind in "fiu"
        if not right or (name == "audio" and array.ndim != 3):
            raise DataError(
                f"{paths[name]} is {array.dtype} {array.shape}; with {count} labels it must be "
                f"numbers of shape {wanted.get(name, (count,))} (audio: three dimensions)."
            )
    return found
