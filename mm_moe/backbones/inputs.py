"""Checks of what enters a tower, with the numbers and a way out."""

from __future__ import annotations

from torch import Tensor

from mm_moe.errors import ConfigError


def check_pixels(pixels_NCHW: Tensor, image_size: int) -> None:
    """Raise ConfigError unless the images are squares of `image_size` pixels."""
    height, width = pixels_NCHW.shape[-2:]
    if (height, width) != (image_size, image_size):
        raise ConfigError(
            f"the image tower takes {image_size} x {image_size} pixels, the batch "
            f"has {height} x {width}; use this model's own processor."
        )


def check_length(length: int, positions: int) -> None:
    """Raise ConfigError if a text has more tokens than the tower has positions."""
    if length > positions:
        raise ConfigError(
            f"a text of {length} tokens does not fit the text tower's {positions} positions; "
            f"use this model's own processor, or truncate to {positions}."
        )
