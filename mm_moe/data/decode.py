"""Encoded images to RGB pictures, without trust in the bytes."""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from PIL import Image

MAX_PIXELS = 64_000_000  # 8000 x 8000; a larger picture is taken for a decompression bomb
# Formats with a decoder inside Pillow; others (EPS, for one) start outside programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")


class UndecodableImageError(Exception):
    """An image that cannot be read; the text says why, without any of its content."""


@dataclass(frozen=True)
class Region:
    """A part of an encoded image; nothing is decoded before `decode_image`.

    Attributes:
        encoded: bytes of the whole image, or its path.
        box: left, top, right and bottom in pixels.
    """

    encoded: bytes | str
    box: tuple[int, int, int, int]


def decode_image(payload: Any) -> Image.Image:
    """Read one image as RGB.

    Transparent pixels lie on white (Pillow alone would show the colours hidden under them, mostly
    black). 16-bit grey keeps its upper 8 bits (Pillow alone would clip at 255).

    Args:
        payload: encoded bytes, a path or URL to them, a `Region` of such an image, or an image that
            is decoded already.

    Raises:
        UndecodableImageError: no such file, not an image, truncated, or too large.
    """
    if isinstance(payload, Image.Image):
        return to_rgb(payload)
    if isinstance(payload, Region):
        whole = decode_image(payload.encoded)
        if payload.box[2] > whole.width or payload.box[3] > whole.height:
            raise UndecodableImageError(f"{whole.width} x {whole.height} pixels, box {payload.box}")
        return whole.crop(payload.box)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limit warns; ours below refuses
            image = Image.open(io.BytesIO(_read(payload)), formats=FORMATS)
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UndecodableImageError(f"{width} x {height} pixels, limit {MAX_PIXELS:,}")
            return to_rgb(image)
    except UndecodableImageError:
        raise
    except Exception as error:  # a decoder on foreign bytes raises nearly anything
        raise UndecodableImageError(type(error).__name__) from error


def _read(payload: bytes | str | os.PathLike[str]) -> bytes:
    if isinstance(payload, bytes):
        return payload
    if "://" in str(payload):
        with fsspec.open(str(payload), "rb") as file:
            return file.read()
    return Path(payload).read_bytes()


def to_rgb(image: Image.Image) -> Image.Image:
    """An RGB copy: transparency over white, 16-bit grey scaled."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
