"""AV-MNIST rebuilt: a written digit of which little is left, and the same digit spoken in noise.

Source: `mnist_train.npz` and `mnist_test.npz` (image uint8 (N, 28, 28), label (N,), row (N,), the
number in the original order), `fsdd.parquet` (Free Spoken Digit Dataset: id, audio {bytes}, digit,
speaker, index) and, for `noise` "esc10", `esc10_8khz.parquet` (ESC-10: id, category, fold, audio).

The image keeps its leading principal components, reconstructed without the mean. The audio is the
next recording of the digit in the order of the rows, over and over, with noise, as a spectrogram.
The last twelfth of the training rows is the validation split (rows 55,000 to 59,999 of MNIST).

Where it differs from the generator of the published data: the components are fitted on training
rows alone and used for all; recordings, speakers and noises of a split are its own; every row is
made from its number, so that image, audio and label belong together (the generator wrote
spectrograms in the order in which processes finished).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from mm_moe.data.prepare.raw import ARRAYS, SPLITS, RawDataSet, RawRow
from mm_moe.data.prepare.spoken import coloured_noise, cut, mix, read_wav, spectrogram
from mm_moe.data.reading import reading
from mm_moe.data.schema import SINGLE_LABEL
from mm_moe.errors import ConfigError, DataError
from mm_moe.registry import nearest

SIDE = 28
VALIDATION_PART = 12  # one row of so many training rows
PIXEL = 255.0  # what both modalities are divided by, as in the published loader
NOISES = ("esc10", "coloured", "none")
AUDIO_SPLITS = {  # name -> split -> which recordings (speaker, index) it has
    "recording": {
        "train": lambda speaker, index: index >= 10,
        "validation": lambda speaker, index: 5 <= index < 10,
        "test": lambda speaker, index: index < 5,  # the convention of the recordings' authors
    },
    "speaker": {
        "train": lambda speaker, index: speaker not in ("lucas", "yweweler"),
        "validation": lambda speaker, index: speaker == "lucas",
        "test": lambda speaker, index: speaker == "yweweler",
    },
    "published": {
        "train": lambda speaker, index: index < 40,
        "validation": lambda speaker, index: index < 40,
        "test": lambda speaker, index: index >= 40,
    },
}
FOLDS = {"train": (1, 2, 3), "validation": (4,), "test": (5,)}  # of ESC-10


class AvMnistRaw(RawDataSet):
    """The recipe above.

    Args:
        source: the folder with the files.
        components: principal components that an image keeps. 4 is the fewest with a quarter of the
            variance, and leaves a classifier about 65% (the published image accuracy); 5 leaves
            about 75%.
        audio_split: recordings of the splits: "recording" (numbers 0 to 4 of each speaker and digit
            are test, 5 to 9 validation), "speaker" (yweweler is test, lucas validation) or
            "published" (numbers from 40 are test; validation shares those of training).
        noise: "esc10", "coloured" or "none".
        snr_db: power of the speech over that of the noise. With 12,000 rows of 56 x 56 a LeNet
            reached 78% on the validation split at 0 dB, with 6,000 rows 37% at -10 dB (42% are
            published for the generator's own noise).
        audio_size: bins and frames of the spectrogram; 112 are the published ones.
        train_rows: only the first so many training rows; 0: all.
        validation_rows: likewise.
        test_rows: likewise.
        seed: of the noise; each row's noise depends on it and on the row's number.

    Raises:
        ConfigError: an option out of range.
        DataError: a file is missing or not in the layout, or a split lacks recordings of a digit.
    """

    name = "av_mnist"
    problem_type = SINGLE_LABEL
    task = SINGLE_LABEL
    license = (
        "MNIST (Y. LeCun, C. Cortes) CC BY-SA 3.0; Free Spoken Digit Dataset (Z. Jackson et al.) "
        "CC BY-SA 4.0; ESC-10 (K. J. Piczak) CC BY 3.0 and CC0 clips"
    )
    notes: tuple[str, ...] = (
        "Images are sums of principal components without the mean; values can be negative.",
        "Image and audio of a row share the digit and nothing else.",
    )

    def __init__(
        self,
        source: Path,
        *,
        components: int = 4,
        audio_split: str = "recording",
        noise: str = "esc10",
        snr_db: float = 3.0,
        audio_size: int = 112,
        train_rows: int = 0,
        validation_rows: int = 0,
        test_rows: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(source)
        if noise not in NOISES:
            raise ConfigError(f"av_mnist: unknown noise {noise!r}; {nearest(noise, list(NOISES))}")
        if audio_split not in AUDIO_SPLITS:
            known = nearest(audio_split, list(AUDIO_SPLITS))
            raise ConfigError(f"av_mnist: unknown audio_split {audio_split!r}; {known}")
        if not 1 <= components <= SIDE**2:
            raise ConfigError(f"av_mnist: components ({components}) must lie in 1 to {SIDE**2}.")
        if audio_size < 8 or min(train_rows, validation_rows, test_rows) < 0:
            raise ConfigError(
                f"av_mnist: audio_size ({audio_size}) must be at least 8, and train_rows "
                f"({train_rows}), validation_rows ({validation_rows}) and test_rows ({test_rows}) "
                "at least 0 (all)."
            )
        self.kinds = {"image": ARRAYS, "audio": ARRAYS}
        self.scales = {"image": PIXEL, "audio": PIXEL}
        self.label_names = tuple(map(str, range(10)))
        self.components, self.audio_split, self.noise = components, audio_split, noise
        self.snr_db, self.audio_size, self.seed = float(snr_db), audio_size, seed
        self.limits = {
            "train": train_rows,
            "validation": validation_rows,
            "test": test_rows,
        }
        files = ["mnist_train.npz", "mnist_test.npz", "fsdd.parquet"]
        files += ["esc10_8khz.parquet"] if noise == "esc10" else []
        self.files = [self.need(name) for name in files]

    def splits(self) -> tuple[str, ...]:
        """Train, validation and test."""
        return SPLITS

    def indices(self) -> list[Path]:
        """Every file that is read."""
        return self.files

    @property
    def options(self) -> dict[str, Any]:
        """The recipe's numbers."""
        return {
            "components": self.components,
            "audio_split": self.audio_split,
            "noise": self.noise,
            "snr_db": self.snr_db,
            "audio_size": self.audio_size,
            **{f"{split}_rows": limit for split, limit in self.limits.items()},
            "seed": self.seed,
        }

    def rows(self, split: str) -> Iterator[RawRow]:
        """Rows in the order of MNIST; the recordings of a digit follow one another in a circle."""
        found = self.written(split)
        fitted = self._spans(train := _digits(self.files[0]))["train"]
        basis = LeadingComponents(train["image"][fitted], count=self.components)
        recordings = self.spoken(split, set(map(int, found["label"])) & set(range(10)))
        noises = self._noises(split)
        times = dict.fromkeys(recordings, 0)
        for image, label, row in zip(*found.values(), strict=True):
            digit, name = int(label), f"mnist-{int(row):05d}"
            if digit not in recordings:
                yield RawRow(name, fault=f"wrong label: {digit} is no digit")
                continue
            clips = recordings[digit]
            clip = clips[times[digit] % len(clips)]
            times[digit] += 1
            audio = self._audio(clip, noises, number=int(row))
            yield RawRow(name, {"image": basis(image), "audio": audio}, digit)

    def written(self, split: str) -> dict[str, np.ndarray]:
        """Pictures, labels and row numbers of a split, as many as its limit allows."""
        found = _digits(self.files[1 if split == "test" else 0])
        span = self._spans(found)[split]
        limit = self.limits[split] or len(found["label"])
        return {key: value[span][:limit] for key, value in found.items()}

    def _spans(self, found: dict[str, np.ndarray]) -> dict[str, slice]:
        """Split -> its rows in its file."""
        last = len(found["label"]) - len(found["label"]) // VALIDATION_PART
        return {"train": slice(0, last), "validation": slice(last, None), "test": slice(None)}

    def _audio(self, clip: np.ndarray, noises: list[np.ndarray], *, number: int) -> np.ndarray:
        """The spectrogram of one row."""
        generator = np.random.default_rng([self.seed, number])
        if self.noise == "coloured":
            noise = coloured_noise(len(clip), generator=generator)
        elif noises:
            noise = noises[int(generator.integers(len(noises)))]
            noise = cut(noise, len(clip), generator=generator)
        else:
            noise = np.zeros(len(clip))
        return spectrogram(mix(clip, noise, snr_db=self.snr_db), size=self.audio_size)

    def spoken(self, split: str, digits: set[int]) -> dict[int, list[np.ndarray]]:
        """Digit -> its clips in this split, in the order of their ids."""
        belongs = AUDIO_SPLITS[self.audio_split][split]
        found: dict[int, list[np.ndarray]] = {digit: [] for digit in sorted(digits)}
        columns = ["id", "audio", "digit", "speaker", "index"]
        for row in _table(self.files[2], columns):
            if row["digit"] in found and belongs(row["speaker"], row["index"]):
                found[row["digit"]].append(read_wav(row["audio"]["bytes"], name=row["id"]))
        for digit, clips in found.items():
            if not clips:
                raise DataError(
                    f"{self.files[2]} has no recording of {digit} for split {split!r} by "
                    f"audio_split {self.audio_split!r}; take another."
                )
        return found

    def _noises(self, split: str) -> list[np.ndarray]:
        """The noises of this split, which no other split has."""
        if self.noise != "esc10":
            return []
        rows = _table(self.files[3], ["id", "fold", "audio"])
        clips = [
            read_wav(row["audio"]["bytes"], name=row["id"])
            for row in rows
            if row["fold"] in FOLDS[split]
        ]
        if not clips:
            raise DataError(f"{self.files[3]} has no noise in folds {FOLDS[split]}.")
        return clips


class LeadingComponents:
    """Reduces a picture to its leading components, without adding the mean back.

    Args:
        images: uint8 (N, H, W) that the components are fitted on.
        count: how many are kept.
    """

    def __init__(self, images: np.ndarray, *, count: int) -> None:
        flat = images.reshape(len(images), -1).astype(np.float64)
        self.mean = flat.mean(0)
        covariance = flat.T @ flat / len(flat) - np.outer(self.mean, self.mean)
        values, vectors = np.linalg.eigh(covariance)
        self.vectors = vectors[:, ::-1][:, :count]
        self.share = float(values[::-1][:count].sum() / values.sum())

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """The picture (H, W) as float32."""
        coordinates = (image.reshape(-1) - self.mean) @ self.vectors
        return (self.vectors @ coordinates).reshape(image.shape).astype(np.float32)


def _digits(path: Path) -> dict[str, np.ndarray]:
    """Images, labels and row numbers."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {key: file[key] for key in ("image", "label", "row")}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"{path} does not hold the arrays image, label and row.") from error
    image, counts = found["image"], {len(value) for value in found.values()}
    if image.shape[1:] != (SIDE, SIDE) or image.dtype != np.uint8 or len(counts) != 1:
        raise DataError(
            f"{path}: image is {image.dtype} {image.shape}, with {len(found['label'])} labels and "
            f"{len(found['row'])} row numbers; it must be uint8 (N, {SIDE}, {SIDE}) with N of each."
        )
    return found


def _table(path: Path, columns: list[str]) -> list[dict[str, Any]]:
    with reading(str(path)):
        return pq.read_table(path, columns=columns).to_pylist()
