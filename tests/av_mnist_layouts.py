"""Tiny written and spoken digits in the layouts that the AV-MNIST adapters read."""

import io
import wave
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def wav(samples: np.ndarray, *, rate: int = 8000) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def tone(hertz: float, *, count: int = 2000) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(count) / 8000)


def av_mnist(folder: Path) -> Path:
    """24 training and 12 test pictures; a digit's recording is a tone of 100 * (digit + 1) Hz."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for part, count, first in (("train", 24, 0), ("test", 12, 60000)):
        np.savez(
            folder / f"mnist_{part}.npz",
            image=rng.integers(0, 256, (count, 28, 28), dtype=np.uint8),
            label=(np.arange(count) % 10).astype(np.uint8),
            row=np.arange(first, first + count, dtype=np.int32),
        )
    rows = [
        {
            "id": f"{digit}_lucas_{index}",
            "audio": {"bytes": wav(tone(100 * (digit + 1))), "path": None},
            "digit": digit,
            "speaker": "lucas",
            "index": index,
        }
        for digit in range(10)
        for index in (0, 5, 10, 40)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "fsdd.parquet")
    noises = [
        {
            "id": f"{fold}-n",
            "category": "rain",
            "fold": fold,
            "audio": {"bytes": wav(rng.uniform(-0.5, 0.5, 3000)), "path": None},
        }
        for fold in range(1, 6)
    ]
    pq.write_table(pa.Table.from_pylist(noises), folder / "esc10_8khz.parquet")
    return folder


def avmnist_npy(folder: Path) -> Path:
    """Float images, labels as floats, spectrograms of uint8."""
    rng = np.random.default_rng(1)
    for name in ("image", "audio"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 24), ("test", 6)):
        np.save(folder / "image" / f"{part}_data.npy", rng.normal(size=(count, 784)) * 100)
        audio = rng.integers(0, 256, (count, 112, 112), dtype=np.uint8)
        np.save(folder / "audio" / f"{part}_data.npy", audio)
        np.save(folder / f"{part}_labels.npy", (np.arange(count) % 10).astype(np.float64))
    return folder
