"""Towers of other backbones as encoders of clinical data: notes, pictures, slices of a volume.

Axes: N rows, S slices of a volume, L tokens of the inner tower, W its width, P tokens, H width of a
token.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_moe.backbones.base import Backbone, Payload, ProcessorNeeds, Tower, check_options
from mm_moe.backbones.clinical_tokens import (
    QUERY_STD,
    AttentionPool,
    RawInput,
    TokenEncoder,
    TokenShape,
)
from mm_moe.backbones.clinical_volume import volume_places
from mm_moe.backbones.dual import PART_OPTIONS, build_part
from mm_moe.batch import IMAGE, TEXT
from mm_moe.registry import BACKBONES

DEFAULT_PART = "small_clip"


def split_part(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inner backbone's part of a tower's options, and the rest."""
    part = {key: value for key, value in options.items() if key in PART_OPTIONS}
    return {"backbone": DEFAULT_PART, **part}, {
        key: value for key, value in options.items() if key not in PART_OPTIONS
    }


def part_needs(part: Mapping[str, Any]) -> ProcessorNeeds:
    """What the inner backbone takes in."""
    needs: ProcessorNeeds = BACKBONES.resolve(part["backbone"]).processor_needs(
        part.get("config", {})
    )
    return needs


def built_part(part: dict[str, Any], name: str) -> tuple[Backbone, dict[str, Any]]:
    """The inner backbone, and the part that builds it again without reading its weights."""
    check_options(f"clinical.towers.{name}", part, PART_OPTIONS)
    built = build_part(part, name)
    source = part.get("pretrained", part.get("source"))
    found = {"backbone": part["backbone"], "config": built.settings}
    return built, found | ({"source": source} if source else {})


class LibraryEncoder(TokenEncoder):
    """A text or an image through the tower of another backbone, whose tokens P queries read.

    Attributes:
        part: what builds the inner tower again.
    """

    kind: ClassVar[str]

    def __init__(self, raw: RawInput, shape: TokenShape, *, part: dict[str, Any]) -> None:
        super().__init__()
        built, self.part = built_part(part, self.kind)
        self.inner: Tower = built.towers[self.kind]  # type: ignore[assignment]
        self.pool = AttentionPool(self.inner.width, shape)

    def forward(self, payload: Payload) -> Tensor:
        """(N, P, H)."""
        x_NLW, mask_NL = run_tower(self.inner, payload)
        return self.pool(x_NLW, mask_NL)

    def blank(self) -> Payload:
        """The inner tower's."""
        return self.inner.blank()

    def new_parts(self) -> list[nn.Module]:
        """What reads the inner tower, which may be pretrained."""
        return [self.pool, *self.inner.new_parts()]


class NoteEncoder(LibraryEncoder):
    """Notes; payload: input_ids and attention_mask (N, L)."""

    kind = TEXT


class PictureEncoder(LibraryEncoder):
    """Pictures; payload: pixel_values (N, 3, side, side)."""

    kind = IMAGE


class SliceEncoder(TokenEncoder):
    """Slices of a volume, each through the image tower of another backbone, read by P queries.

    `slices` of them are taken at equal distances along `axis` of the volume, brought to the side of
    the tower's pictures by bilinear interpolation, and given to it in grey. Each slice becomes one
    feature, with a learned position.

    Args:
        raw: the modality; its rows are volumes (X, Y, Z) or (1, X, Y, Z).
        shape: of the tokens.
        part: of the inner backbone.
        slices: S.
        axis: 0, 1 or 2.
    """

    options: ClassVar[Mapping[str, int]] = MappingProxyType({"slices": 1, "axis": 0})

    def __init__(
        self,
        raw: RawInput,
        shape: TokenShape,
        *,
        part: dict[str, Any],
        slices: int = 8,
        axis: int = 2,
    ) -> None:
        super().__init__()
        channels, self.places = volume_places(raw)
        self.raw_shape, self.axis = raw.shape, axis % 3
        self.channels, self.num_slices = channels, min(slices, self.places[self.axis])
        self.side = part_needs(part).image_size
        built, self.part = built_part(part, IMAGE)
        self.inner: Tower = built.towers[IMAGE]  # type: ignore[assignment]
        self.project = nn.Linear(self.inner.out_width, shape.width)
        self.position = nn.Embedding(self.num_slices, shape.width)
        nn.init.normal_(self.position.weight, std=QUERY_STD)
        self.pool = AttentionPool(shape.width, shape)

    def pictures(self, payload: Payload) -> Tensor:
        """The slices as pictures (N * S, 3, side, side)."""
        x = payload["values"].view(-1, self.channels, *self.places).mean(1)
        depth = self.places[self.axis]
        # the middles of S equal parts
        middle_S = (torch.arange(self.num_slices, device=x.device) * 2 + 1) * depth
        chosen_S = middle_S.div(2 * self.num_slices, rounding_mode="floor")
        x = x.index_select(self.axis + 1, chosen_S).movedim(self.axis + 1, 1).flatten(0, 1)
        x = F.interpolate(
            x[:, None], size=(self.side, self.side), mode="bilinear", align_corners=False
        )
        return x.expand(-1, 3, -1, -1)

    def forward(self, payload: Payload) -> Tensor:
        """(N, P, H)."""
        inner = {"pixel_values": self.pictures(payload)}
        x_RLW, _ = run_tower(self.inner, inner)
        feature_RD = self.inner.pool(x_RLW, inner, 0)
        x_NSH = self.project(feature_RD).unflatten(0, (-1, self.num_slices))
        return self.pool(x_NSH + self.position.weight)

    def blank(self) -> Payload:
        """A volume of zeros."""
        return {"values": self.position.weight.new_zeros(1, *self.raw_shape)}

    def new_parts(self) -> list[nn.Module]:
        """What reads the inner tower."""
        return [self.project, self.position, self.pool, *self.inner.new_parts()]


def run_tower(tower: Tower, payload: Payload) -> tuple[Tensor, Tensor | None]:
    """The tokens (N, L, W) that leave a tower's blocks, and their mask."""
    entrance = tower.enter(payload)
    x_NLW = entrance.x_NLD
    for index in range(tower.num_blocks):
        x_NLW, _ = tower.block(index, x_NLW, entrance.mask_NL, memory=entrance.memory)
    return x_NLW, entrance.mask_NL
