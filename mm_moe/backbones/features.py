"""Features that were computed before, instead of towers: the head of a model is all that is left.

For data that `launch/prepare_data.py features` wrote. A tower here hands its one vector through, so
a model has the logits of the frozen backbone that made the vectors. There are no blocks, hence
nothing for prompts, adapters and experts to act on.

Axes: N rows, D width of a feature.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mm_moe.backbones.base import (
    Backbone,
    Payload,
    ProcessorNeeds,
    SequenceNeeds,
    Tower,
    check_modalities,
    check_options,
)
from mm_moe.batch import IMAGE, TEXT
from mm_moe.errors import ConfigError
from mm_moe.moe.context import TokenContext
from mm_moe.moe.layer import RoutingRecord


class FeatureTower(Tower):
    """One modality; payload: values (N, 1, D) and mask (N, 1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = self.out_width = self.raw_width = width
        self.num_blocks = 0
        # says where the model is, and in which precision; it enters nothing
        self.place = nn.Parameter(torch.zeros(1), requires_grad=False)

    def embed(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """The vector as the one token."""
        values_N1D = payload["values"]
        if values_N1D.shape[1:] != (1, self.width):
            raise ConfigError(
                f"the model takes one feature of width {self.width} a row, the batch has "
                f"{tuple(values_N1D.shape[1:])}; use this model's own data."
            )
        return values_N1D, payload["mask"]

    def block(
        self,
        index: int,
        x_NLD: Tensor,
        mask_NL: Tensor | None = None,
        keys_values: tuple[Tensor, Tensor] | None = None,
        context: TokenContext | None = None,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, RoutingRecord | None]:
        """There is none."""
        raise IndexError(f"a feature tower has no block {index}")

    def pool(self, x_NLD: Tensor, payload: Payload, prefix: int) -> Tensor:
        """The vector."""
        return x_NLD[:, prefix]

    def blank(self) -> Payload:
        """A vector of zeros."""
        mask = torch.ones(1, 1, dtype=torch.bool, device=self.place.device)
        return {"values": self.place.new_zeros(1, 1, self.width), "mask": mask}

    def feed_forwards(self) -> list[tuple[nn.Module, str]]:
        """None."""
        return []


class FeaturesBackbone(Backbone):
    """One `FeatureTower` per modality, for any number of them.

    Args:
        settings: "sequences": modality -> {"width", "length": 1, ...} as the data describe it; a
            run fills it in.
        modalities: which of them to build, and their order.

    Raises:
        ConfigError: no widths, or sequences of several steps.
    """

    supported: ClassVar[tuple[str, ...]] = (IMAGE, TEXT)  # any name in `sequences` will do
    takes_sequences: ClassVar[bool] = True

    def __init__(self, settings: dict[str, Any], *, modalities: tuple[str, ...]) -> None:
        needs = _needs(settings)
        check_modalities(modalities, tuple(needs))
        self.supported = tuple(needs)  # type: ignore[misc]
        super().__init__(settings, modalities=modalities)
        self.set_towers({name: FeatureTower(needs[name].width) for name in modalities})

    def feature_width(self, modality: str) -> int:
        """That of the cached features."""
        return self.towers[modality].out_width  # type: ignore[return-value]

    @classmethod
    def processor_needs(cls, settings: dict[str, Any]) -> ProcessorNeeds:
        """Widths, and mean and spread if there are any (cached features have none)."""
        return ProcessorNeeds(sequences=_needs(settings))


def _needs(settings: dict[str, Any]) -> dict[str, SequenceNeeds]:
    check_options("features", settings, ["sequences"])
    found = settings.get("sequences") or {}
    if not found:
        raise ConfigError(
            "the backbone 'features' needs the widths of the data; take --dataset cached_features "
            "with a folder that `python launch/prepare_data.py features` wrote."
        )
    for name, about in found.items():
        width, length = about.get("width"), about.get("length")
        if not isinstance(width, int) or width < 1 or length != 1:
            raise ConfigError(
                f"the backbone 'features' takes one vector a row, and {name!r} has width {width!r} "
                f"and length {length!r}; take --backbone sequences."
            )
    return {
        name: SequenceNeeds(about["width"], 1, about.get("mean"), about.get("std"))
        for name, about in found.items()
    }
