"""The image tower of a CLIP in the place of BLIP-2's vision transformer.

The paper takes a CLIP's or EVA-CLIP's transformer, frozen. Here it is the small CLIP that comes
with the package, so that a first stage can be tried without any download.

Axes: N rows, L tokens, D width.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from mm_moe.backbones.base import Tower
from mm_moe.backbones.clip_small import SmallClipBackbone, SmallClipSettings
from mm_moe.batch import IMAGE

SMALL_CLIP = "small_clip"


class ClipVision(nn.Module):
    """A CLIP's image tower with the interface of the library's vision models.

    Args:
        tower: its projection is dropped: the tokens are read, after the tower's last norm (the
            paper's takes them one block earlier, with a norm of their own).
    """

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower: Tower = tower
        tower.projection = nn.Identity()
        self.config = SimpleNamespace(hidden_size=tower.width)

    def forward(self, pixel_values: Tensor) -> BaseModelOutput:
        """Class token and patches (N, L, D)."""
        x_NLD, _ = self.tower.embed({"pixel_values": pixel_values})
        for layer in range(self.tower.num_blocks):
            x_NLD, _ = self.tower.block(layer, x_NLD)
        norm: nn.Module = self.tower.norm_out  # type: ignore[assignment]
        return BaseModelOutput(last_hidden_state=norm(x_NLD))


def small_clip_vision(*, trained: bool = False) -> ClipVision:
    """That of the small CLIP, with random weights or those that come with the package."""
    build: Any = SmallClipBackbone
    only = (IMAGE,)
    backbone = (
        build.load("builtin", settings={}, modalities=only)
        if trained
        else build({}, modalities=only)
    )
    return ClipVision(backbone.towers[IMAGE])


def stand_in_config() -> dict[str, int]:
    """A vision config of the small CLIP's sizes, for a library model whose own is thrown away."""
    small = SmallClipSettings()
    return {
        "hidden_size": small.width,
        "image_size": small.image_size,
        "patch_size": small.image_size,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 1,
    }
