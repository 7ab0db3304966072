"""Written and spoken digits in pairs: an MNIST picture and a recording of the same digit.

Source: the files of `av_mnist` (without the noises), and its splits of pictures and recordings.
Both are whole: the picture as it is, the recording without noise as a spectrogram in which silence
is 0. Which recording a picture is paired with is a keyed hash of its row, so it does not depend on
how many rows there are. Shi et al. 2019 pair MNIST with pictures of house numbers in this way.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mm_moe.data.chance import draws
from mm_moe.data.prepare.av_mnist import SIDE, AvMnistRaw
from mm_moe.data.prepare.raw import RawRow
from mm_moe.data.prepare.spoken import spectrogram
from mm_moe.errors import ConfigError

POOL = 2  # a spectrogram is made so many times as fine and averaged: less depends on its framing
LOUDEST = 255


class DigitPairsRaw(AvMnistRaw):
    """The recipe above.

    Args:
        source: the folder with the files.
        pairs: recordings that each picture is paired with; its rows are one group.
        audio_split: see `AvMnistRaw`.
        audio_size: bins and frames of the spectrogram.
        train_rows: only the first so many pictures of training; 0: all.
        validation_rows: likewise.
        test_rows: likewise.
        seed: of the pairs.

    Raises:
        ConfigError: an option out of range.
        DataError: see `AvMnistRaw`.
    """

    name = "digit_pairs"
    license = (
        "MNIST (Y. LeCun, C. Cortes) CC BY-SA 3.0; Free Spoken Digit Dataset (Z. Jackson et al.) "
        "CC BY-SA 4.0"
    )
    notes = ("Picture and recording of a row share the digit and nothing else.",)

    def __init__(
        self,
        source: Path,
        *,
        pairs: int = 1,
        audio_split: str = "recording",
        audio_size: int = SIDE,
        train_rows: int = 0,
        validation_rows: int = 0,
        test_rows: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            source,
            audio_split=audio_split,
            noise="none",
            audio_size=audio_size,
            train_rows=train_rows,
            validation_rows=validation_rows,
            test_rows=test_rows,
            seed=seed,
        )
        if pairs < 1:
            raise ConfigError(f"digit_pairs: pairs ({pairs}) must be at least 1.")
        self.pairs = pairs

    @property
    def options(self) -> dict[str, Any]:
        """The recipe's numbers."""
        kept = {key: value for key, value in super().options.items() if key in _KEPT}
        return {"pairs": self.pairs, **kept}

    def rows(self, split: str) -> Iterator[RawRow]:
        """Rows in the order of MNIST."""
        found = self.written(split)
        digits = set(map(int, found["label"])) & set(range(10))
        sounds = {
            digit: [self._sound(clip) for clip in clips]
            for digit, clips in self.spoken(split, digits).items()
        }
        for image, label, row in zip(*found.values(), strict=True):
            digit, group = int(label), f"mnist-{int(row):05d}"
            for pair in range(self.pairs):
                name = group if self.pairs == 1 else f"{group}-{pair}"
                if digit not in sounds:
                    yield RawRow(name, fault=f"wrong label: {digit} is no digit")
                    continue
                draw, _ = draws(
                    f"{group}-{pair}",
                    purpose="pair",
                    dataset=self.name,
                    split=split,
                    seed=self.seed,
                )
                audio = sounds[digit][int(draw * len(sounds[digit]))]
                yield RawRow(name, {"image": image, "audio": audio}, digit, group=group)

    def _sound(self, clip: np.ndarray) -> np.ndarray:
        """A spectrogram, uint8 (audio_size, audio_size); the loudest place is near 255."""
        fine = LOUDEST - spectrogram(clip, size=POOL * self.audio_size).astype(np.float64)
        side = self.audio_size
        return np.round(fine.reshape(side, POOL, side, POOL).mean((1, 3))).astype(np.uint8)


_KEPT = ("audio_split", "audio_size", "train_rows", "validation_rows", "test_rows", "seed")
