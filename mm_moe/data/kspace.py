"""From raw magnetic-resonance signals (k-space) to images: magnitude, phase, noise.

Axes: Y rows, X columns, C coils; the zero frequency stands in the middle of k-space.
"""

from __future__ import annotations

import numpy as np


def centred_image(kspace_YX: np.ndarray) -> np.ndarray:
    """The complex image (..., Y, X): the centred inverse Fourier transform, which keeps energy."""
    axes = (-2, -1)
    shifted = np.fft.ifftshift(kspace_YX, axes=axes)
    return np.fft.fftshift(np.fft.ifft2(shifted, axes=axes, norm="ortho"), axes=axes)


def centre_crop(image_YX: np.ndarray, side: int) -> np.ndarray:
    """The middle (..., side, side) of an image.

    Raises:
        ValueError: the image is smaller.
    """
    rows, columns = image_YX.shape[-2:]
    if min(rows, columns) < side:
        raise ValueError(f"an image of {rows} x {columns} has no {side} x {side} middle")
    top, left = (rows - side) // 2, (columns - side) // 2
    return image_YX[..., top : top + side, left : left + side]


def fill_columns(kspace_YX: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """K-space with zeros on both sides up to `columns`, and the numbers of the measured columns.

    An odd rest goes to the right.

    Raises:
        ValueError: it has more columns.
    """
    missing = columns - kspace_YX.shape[-1]
    if missing < 0:
        raise ValueError(f"k-space has {kspace_YX.shape[-1]} columns, more than {columns}")
    left = missing // 2
    around = [(0, 0)] * (kspace_YX.ndim - 1) + [(left, missing - left)]
    return np.pad(kspace_YX, around), np.arange(left, left + kspace_YX.shape[-1])


def root_sum_of_squares(images_CYX: np.ndarray) -> np.ndarray:
    """The image (Y, X) of several coils, without phase."""
    return np.sqrt(np.square(np.abs(images_CYX)).sum(0))


def magnitude_and_phase(image_YX: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The middle's magnitude and its phase in (-pi, pi], each float32 (side, side)."""
    middle = centre_crop(image_YX, side)
    return np.abs(middle).astype(np.float32), np.angle(middle).astype(np.float32)


def add_noise(image_YX: np.ndarray, *, percent: float, seed: int) -> np.ndarray:
    """The image plus Gaussian noise in its real and in its imaginary part.

    Each part's spread is `percent` hundredths of the largest magnitude.
    """
    spread = percent / 100 * np.abs(image_YX).max()
    parts = np.random.default_rng(seed).normal(0, spread, (2, *image_YX.shape))
    return image_YX + (parts[0] + 1j * parts[1])
