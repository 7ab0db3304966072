"""AV-MNIST from digits: what is kept of a picture, which recording a row gets, what is refused."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from mm_moe.data.prepare.av_mnist import AvMnistRaw, LeadingComponents
from mm_moe.data.prepare.avmnist_npy import AvMnistNpyRaw
from mm_moe.data.prepare.spoken import framing, mix, read_wav, spectrogram
from mm_moe.data.prepare.write import prepare
from mm_moe.data.sets.prepared import AvMnistData
from mm_moe.errors import ConfigError, DataError
from tests.av_mnist_layouts import av_mnist, avmnist_npy, tone, wav


def test_components_by_hand():
    images = np.zeros((4, 1, 2), dtype=np.uint8)
    images[:, 0, 0] = [0, 10, 0, 10]  # all variance but 1 of 26 is in the first pixel
    images[:, 0, 1] = [1, 1, 3, 3]
    basis = LeadingComponents(images, count=1)
    assert basis.share == pytest.approx(25 / 26)
    assert basis(images[1]).tolist() == [[5.0, 0.0]]  # 10 - mean 5; the mean is not added back
    assert basis(images[0]).tolist() == [[-5.0, 0.0]]


@pytest.mark.parametrize("length", [224, 1000, 3000, 3025, 18262])
def test_framing_gives_exactly_the_frames(length):
    segment, overlap = framing(length, frames=112)
    assert 112 * segment - 111 * overlap <= length < 113 * segment - 112 * overlap


def test_a_tone_is_one_line_of_the_spectrogram():
    picture = spectrogram(tone(2000), size=112)
    assert picture.shape == (112, 112)
    assert picture.dtype == np.uint8
    # bin 0 is the last row; 2000 Hz of 4000 lies at bin 223 * 2000 / 8000 = 56
    assert np.abs(111 - picture.argmin(0) - 56).max() <= 1
    assert picture.max() == 255


def test_noise_has_the_asked_power():
    speech, noise = tone(300), np.random.default_rng(0).normal(size=2000)
    added = mix(speech, noise, snr_db=10.0) - speech
    assert np.mean(speech**2) / np.mean(added**2) == pytest.approx(10.0)
    assert mix(speech, np.zeros(2000), snr_db=0.0) is speech


def test_rows_share_the_digit_and_do_not_depend_on_each_other(tmp_path):
    raw = AvMnistRaw(av_mnist(tmp_path), noise="none")
    for split, first in (("train", 0), ("validation", 22), ("test", 60000)):
        for n, row in enumerate(raw.rows(split)):
            assert row.id == f"mnist-{first + n:05d}"
            assert row.payload["image"].shape == (28, 28)
            hertz = 100 * (row.label + 1)
            line = 111 - row.payload["audio"].argmin(0)
            assert np.abs(line - 223 * hertz / 8000).max() <= 2, row.id
    few = AvMnistRaw(tmp_path, train_rows=3, noise="esc10")
    many = AvMnistRaw(tmp_path, noise="esc10")
    for a, b in zip(few.rows("train"), many.rows("train"), strict=False):
        assert all(np.array_equal(a.payload[name], b.payload[name]) for name in a.payload)
    assert len(list(few.rows("train"))) == 3


def test_prepared_rows_come_back(tmp_path):
    raw = AvMnistRaw(av_mnist(tmp_path / "raw"), audio_size=16)
    info = prepare(raw, output=tmp_path / "out")
    assert info["options"]["components"] == 4
    assert info["modalities"]["audio"] == {
        "kind": "array",
        "shape": [16, 16],
        "dtype": "uint8",
        "scale": 255.0,
    }
    source = AvMnistData(str(tmp_path / "out"))
    assert source.array_shapes["image"] == {"shape": [28, 28], "scale": 255.0}
    found = [source.to_sample(row) for row in source.stream("test")]
    for sample, row in zip(found, raw.rows("test"), strict=True):
        assert sample.label == row.label
        for name, value in row.payload.items():
            assert np.array_equal(sample.payload[name].array(), value)


def test_published_arrays(tmp_path):
    raw = AvMnistNpyRaw(avmnist_npy(tmp_path / "raw"))
    ids = {split: [row.id for row in raw.rows(split)] for split in raw.splits()}
    assert [len(rows) for rows in ids.values()] == [22, 2, 6]
    assert ids["validation"] == ["train-00022", "train-00023"]
    images = np.load(tmp_path / "raw" / "image" / "train_data.npy")
    row = next(iter(raw.rows("validation")))
    assert np.allclose(row.payload["image"].reshape(-1), images[22])
    assert row.label == 2
    np.save(tmp_path / "raw" / "train_labels.npy", np.arange(23))
    with pytest.raises(DataError, match=r"\(24, 784\); with 23 labels"):
        list(raw.rows("train"))


def test_bad_rows_are_named(tmp_path):
    folder = av_mnist(tmp_path / "raw")
    with np.load(folder / "mnist_test.npz") as file:
        arrays = dict(file)
    arrays["label"][3] = 11
    np.savez(folder / "mnist_test.npz", **arrays)
    info = prepare(AvMnistRaw(folder), output=tmp_path / "out", max_bad_ratio=0.5)
    assert info["splits"]["test"]["quarantined"] == 1
    line = json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())
    assert line["id"] == "mnist-60003"
    assert "11 is no digit" in line["reason"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"components": 0}, "components"),
        ({"noise": "esc50"}, "did you mean esc10"),
        ({"audio_split": "speakers"}, "did you mean speaker"),
        ({"audio_size": 4}, "audio_size"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, options, match):
    with pytest.raises(ConfigError, match=match):
        AvMnistRaw(av_mnist(tmp_path), **options)


def test_a_source_that_is_not_in_order_is_named(tmp_path):
    folder = av_mnist(tmp_path)
    raw = AvMnistRaw(folder, audio_split="speaker")
    with pytest.raises(DataError, match="no recording of 0 for split 'train'"):
        next(raw.rows("train"))
    table = pq.read_table(folder / "fsdd.parquet")
    pq.write_table(table.drop_columns(["speaker"]), folder / "fsdd.parquet")
    with pytest.raises(DataError, match=r"fsdd\.parquet"):
        next(AvMnistRaw(folder).rows("train"))
    with pytest.raises(DataError, match="16000 Hz"):
        read_wav(wav(tone(100), rate=16000), name="x")
    with pytest.raises(DataError, match="'x' is no readable WAV"):
        read_wav(b"RIFF", name="x")
    np.savez(folder / "mnist_train.npz", image=np.zeros((2, 28)), label=[1, 2], row=[0, 1])
    with pytest.raises(DataError, match=r"uint8 \(N, 28, 28\)"):
        next(AvMnistRaw(folder).rows("train"))
