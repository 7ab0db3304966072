"""Checks of what enters a tower, with the numbers and a way out."""

from __future__ import annotations

import torch
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


def ends_last(num_rows: int, length: int, end: int, device: torch.device) -> Tensor:
    """Token ids (N, L) whose first and only end mark is the last token."""
    other = 0 if end else 1
    ids_NL = torch.full((num_rows, length), other, dtype=torch.long, device=device)
    ids_NL[:, -1] = end
    return ids_NL


def blank_image(weight: Tensor, side: int, *, channels: int = 3) -> dict[str, Tensor]:
    """One image of zeros in the precision and place of a weight."""
    return {"pixel_values": weight.new_zeros(1, channels, side, side)}


def one_token(device: torch.device, *, token: int = 1) -> dict[str, Tensor]:
    """A text of one token."""
    ids_NL = torch.full((1, 1), token, dtype=torch.long, device=device)
    return {"input_ids": ids_NL, "attention_mask": torch.ones_like(ids_NL)}


def all_real(num_rows: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """The attention mask of texts without padding."""
    ones_NL = torch.ones(num_rows, length, dtype=torch.long, device=device)
    return {"attention_mask": ones_NL}
