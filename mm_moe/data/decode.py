"""Encoded images to RGB pictures, without trust in the bytes."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from PIL import Image

from mm_moe.data.retrying import GoneError, NoLengthError, Remote
from mm_moe.data.web import is_http

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


def decode_image(payload: Any, *, remote: Remote | None = None) -> Image.Image:
    """Read one image as RGB.

    Transparent pixels lie on white (Pillow alone would show the colours hidden under them, mostly
    black). 16-bit grey keeps its upper 8 bits (Pillow alone would clip at 255).

    Args:
        payload: encoded bytes, a path or URL to them, a `Region` of such an image, or an image that
            is decoded already.
        remote: how addresses are read. An image from there that does not decode is fetched again:
            it is taken for broken where a second body, of the right length, is broken, too.

    Raises:
        UndecodableImageError: no such file, not an image, truncated, or too large.
        RemoteError: a server that fails, or refuses, for good. That is no fault of the image.
    """
    if isinstance(payload, Image.Image):
        return to_rgb(payload)
    if isinstance(payload, Region):
        whole = decode_image(payload.encoded, remote=remote)
        if payload.box[2] > whole.width or payload.box[3] > whole.height:
            raise UndecodableImageError(f"{whole.width} x {whole.height} pixels, box {payload.box}")
        return whole.crop(payload.box)
    if not isinstance(payload, bytes) and "://" in str(payload):
        return _decode_from(str(payload), remote or Remote())
    try:
        return _decode(payload if isinstance(payload, bytes) else Path(payload).read_bytes())
    except (OSError, ValueError) as error:  # a path may hold anything
        raise UndecodableImageError(type(error).__name__) from error


def _decode_from(url: str, remote: Remote) -> Image.Image:
    """An image at an address; what is broken on the way is fetched again, its length checked."""
    first = _fetch(url, remote)
    try:
        return _decode(first)
    except UndecodableImageError:
        if not is_http(url):
            raise
        try:
            with remote.open(url) as file:
                encoded = file.read()
        except NoLengthError:
            encoded = remote.read(url)
        return _decode(encoded)


def _fetch(url: str, remote: Remote) -> bytes:
    try:
        if is_http(url):
            return remote.read(url)
        with fsspec.open(url, "rb") as file:
            return file.read()
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UndecodableImageError(type(error).__name__) from error
    except GoneError as error:
        raise UndecodableImageError("the address is gone") from error


def _decode(encoded: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limit warns; ours below refuses
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UndecodableImageError(f"{width} x {height} pixels, limit {MAX_PIXELS:,}")
            return to_rgb(image)
    except UndecodableImageError:
        raise
    except Exception as error:  # a decoder on foreign bytes raises nearly anything
        raise UndecodableImageError(type(error).__name__) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An RGB copy: transparency over white, 16-bit grey scaled."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
