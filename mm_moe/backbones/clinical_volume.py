"""Image volumes to P tokens by convolutions in three dimensions.

Axes: N rows, C channels, X x Y x Z places, P tokens, H width of a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from mm_moe.backbones.base import Payload
from mm_moe.backbones.clinical_tokens import PatchEmbedding, RawInput, TokenEncoder, TokenShape
from mm_moe.errors import ConfigError, DataError

POOLS = (2, 3, 4)  # by which the stages shrink each axis
MOST_PLACES = 4  # of each axis that enter the linear layer


class VolumeEncoder(TokenEncoder):
    """Three stages of two 3 x 3 x 3 convolutions, pooling and dropout, one linear layer, patches.

    A stage's pooling is 2, 3 and 4, or the whole axis where less is left; what is larger than 4
    places afterwards is max-pooled to 4, so that a volume of any shape gives a model of bounded
    size. At the 91 x 91 x 109 places of the ADNI atlas nothing of this acts and the places go
    45 x 45 x 54, 15 x 15 x 18, 3 x 3 x 4, as in the source.

    Source: the image encoder of Flex-MoE (Yun et al. 2024) and MoE-Retriever, channels 32, 32 | 64,
    64 | 128, H. Here a ReLU stands behind every convolution.

    Args:
        raw: the modality; its rows are volumes (X, Y, Z) or (C, X, Y, Z).
        shape: of the tokens.
        channels: of the first stage.
    """

    options: ClassVar[Mapping[str, int]] = MappingProxyType({"channels": 1})

    def __init__(self, raw: RawInput, shape: TokenShape, *, channels: int = 32) -> None:
        super().__init__()
        self.raw_shape = raw.shape
        self.channels, self.places = volume_places(raw)
        stages = ((channels, channels), (2 * channels, 2 * channels), (4 * channels, shape.width))
        into = self.channels
        places: tuple[int, ...] = self.places
        self.stages, self.pools = nn.ModuleList(), []
        for (middle, out), pool in zip(stages, POOLS, strict=True):
            self.stages.append(
                nn.Sequential(
                    nn.Conv3d(into, middle, 3, padding=1),
                    nn.ReLU(),
                    nn.Conv3d(middle, out, 3, padding=1),
                    nn.ReLU(),
                )
            )
            kernel = tuple(min(pool, place) for place in places)
            self.pools.append(kernel)
            places = tuple(place // k for place, k in zip(places, kernel, strict=True))
            into = out
        self.left = tuple(min(place, MOST_PLACES) for place in places)
        self.dropout = nn.Dropout3d(shape.dropout)
        self.flat = nn.Linear(shape.width * math.prod(self.left), shape.width)
        self.patches = PatchEmbedding(
            shape.width, num_tokens=shape.num_tokens, token_width=shape.width
        )

    def forward(self, payload: Payload) -> Tensor:
        """(N, P, H)."""
        x = payload["values"]
        if tuple(x.shape[1:]) != self.raw_shape:
            raise DataError(
                f"a volume has shape {tuple(x.shape[1:])}, the encoder takes {self.raw_shape}; use "
                "this model's own data."
            )
        x_NCXYZ = x.view(-1, self.channels, *self.places)
        for stage, kernel in zip(self.stages, self.pools, strict=True):
            x_NCXYZ = self.dropout(F.max_pool3d(stage(x_NCXYZ), kernel))
        if tuple(x_NCXYZ.shape[2:]) != self.left:
            x_NCXYZ = F.adaptive_max_pool3d(x_NCXYZ, self.left)
        return self.patches(self.flat(x_NCXYZ.flatten(1)))

    def blank(self) -> Payload:
        """A volume of zeros."""
        return {"values": self.flat.weight.new_zeros(1, *self.raw_shape)}


def volume_places(raw: RawInput) -> tuple[int, tuple[int, int, int]]:
    """Channels and places of a modality whose rows are volumes.

    Raises:
        ConfigError: they are not.
    """
    if raw.sequence or len(raw.shape) not in (3, 4):
        raise ConfigError(
            f"clinical.towers.{raw.name}: volumes are arrays (X, Y, Z) or (C, X, Y, Z), the rows "
            f"are {raw.shape}; take another kind."
        )
    x, y, z = raw.shape[-3:]
    return (raw.shape[0] if len(raw.shape) == 4 else 1), (x, y, z)
