"""Pairs of a written and a spoken digit: same digit, own recordings of a split, keyed chance."""

import numpy as np
import pytest

from mm_moe.data.prepare.digit_pairs import DigitPairsRaw
from mm_moe.errors import ConfigError
from tests.av_mnist_layouts import av_mnist


def test_a_pair_is_one_digit_written_and_spoken(tmp_path):
    raw = DigitPairsRaw(av_mnist(tmp_path))
    with np.load(tmp_path / "mnist_test.npz") as file:
        pictures = file["image"]
    for n, row in enumerate(raw.rows("test")):
        assert row.id == row.group == f"mnist-{60000 + n:05d}"
        assert np.array_equal(row.payload["image"], pictures[n])
        sound = row.payload["audio"]
        assert sound.shape == (28, 28)
        # a tone of 100 (digit + 1) Hz is loudest in its row, 4000 / 28 Hz a row, from below
        place = 27 - np.bincount(sound.argmax(0)).argmax()
        assert abs(place - 28 * 100 * (row.label + 1) / 4000) <= 1


def test_the_pairs_of_a_row_do_not_depend_on_the_others(tmp_path):
    folder = av_mnist(tmp_path)
    few = list(DigitPairsRaw(folder, audio_split="published", train_rows=3, pairs=2).rows("train"))
    many = DigitPairsRaw(folder, audio_split="published", pairs=2).rows("train")
    assert [row.id for row in few][:3] == ["mnist-00000-0", "mnist-00000-1", "mnist-00001-0"]
    assert [row.group for row in few][:2] == ["mnist-00000"] * 2
    for a, b in zip(few, many, strict=False):
        assert a.id == b.id
        assert np.array_equal(a.payload["audio"], b.payload["audio"])


def test_no_pair_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="pairs"):
        DigitPairsRaw(av_mnist(tmp_path), pairs=0)
