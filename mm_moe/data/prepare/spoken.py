"""Speech and noise: WAV bytes, a mixture at a signal-to-noise ratio, and its spectrogram.

Axes: S samples of a clip, F bins, T frames.
"""

from __future__ import annotations

import io
import math
import wave

import numpy as np

from mm_moe.errors import DataError

RATE = 8000  # samples per second
RANGE_DB = 80.0  # what lies further below the loudest place is silence


def read_wav(content: bytes, *, name: str) -> np.ndarray:
    """Amplitudes (S,) in [-1, 1] of 16-bit mono WAV at 8 kHz.

    Raises:
        DataError: not such a file, or an empty one; names it.
    """
    try:
        with wave.open(io.BytesIO(content)) as file:
            found = (file.getframerate(), file.getnchannels(), file.getsampwidth())
            frames = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise DataError(f"recording {name!r} is no readable WAV file: {error}.") from error
    if found != (RATE, 1, 2) or len(frames) < 2:
        raise DataError(
            f"recording {name!r} has {found[0]} Hz, {found[1]} channels, {8 * found[2]} bits and "
            f"{len(frames)} bytes; it must be 8000 Hz, 1 channel, 16 bits, and not empty."
        )
    return np.frombuffer(frames[: len(frames) // 2 * 2], dtype="<i2").astype(np.float64) / 2**15


def coloured_noise(length: int, *, generator: np.random.Generator) -> np.ndarray:
    """Pink noise (S,): power falls with the inverse of the frequency."""
    spectrum = np.fft.rfft(generator.standard_normal(length))
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    spectrum[0] = 0
    return np.fft.irfft(spectrum, n=length)


def cut(noise: np.ndarray, length: int, *, generator: np.random.Generator) -> np.ndarray:
    """A piece (S,) of a noise from a random place; a noise that is too short is repeated."""
    noise = np.tile(noise, -(-length // len(noise)))
    start = int(generator.integers(len(noise) - length + 1))
    return noise[start : start + length]


def mix(speech: np.ndarray, noise: np.ndarray, *, snr_db: float) -> np.ndarray:
    """Speech plus noise (S,), whose power is `snr_db` below that of the speech."""
    power = np.mean(noise**2)
    if power == 0:
        return speech
    wanted = np.mean(speech**2) / 10 ** (snr_db / 10)
    return speech + noise * math.sqrt(wanted / power)


def framing(length: int, *, frames: int) -> tuple[int, int]:
    """The smallest segment and its overlap that give exactly this number of frames.

    frames * segment - (frames - 1) * overlap <= length, and one frame more does not fit.
    """
    hop = length // frames
    overlap = max(0, length - (frames + 1) * hop + 1)
    return hop + overlap, overlap


def spectrogram(speech: np.ndarray, *, size: int = 112) -> np.ndarray:
    """A clip of any length as uint8 (F, T) = (size, size); 255 is silence, 0 its loudest place.

    Hann windows, 2 * size - 1 points of the transform, decibels, the loudest `RANGE_DB` of the
    clip. The published pictures went through matplotlib's colour map "Greys"; here it is linear.
    """
    points = 2 * size - 1
    speech = np.pad(speech, (0, max(0, 2 * size - len(speech))))
    segment, overlap = framing(len(speech), frames=size)
    hop = segment - overlap
    windows = np.lib.stride_tricks.sliding_window_view(speech, segment)[::hop][:size]
    weight = np.hanning(segment + 2)[1:-1]
    # a segment longer than the transform is folded by taking its first points
    power_TF = np.abs(np.fft.rfft(windows * weight, n=points)) ** 2
    level_TF = 10 * np.log10(power_TF + 1e-12)
    top = level_TF.max()
    low = max(level_TF.min(), top - RANGE_DB)
    loud_TF = (np.clip(level_TF, low, top) - low) / max(top - low, 1e-9)
    return np.round(255 * (1 - loud_TF.T[::-1])).astype(np.uint8)
