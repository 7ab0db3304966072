"""Towers for sequences of features: words, voice, face, sensors, as arrays (T, D).

Each tower projects the steps linearly, adds learned positions, runs pre-norm transformer blocks
and averages the real steps. The widths come from the data.

Axes: N rows, L steps (padded on the right), D width, P extra key/value pairs, H heads.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mm_moe.backbones.attention import attend
from mm_moe.backbones.base import (
    Backbone,
    Payload,
    ProcessorNeeds,
    SequenceNeeds,
    Tower,
    check_modalities,
    check_options,
    run_feed_forward,
)
from mm_moe.backbones.inputs import check_length
from mm_moe.errors import ConfigError
from mm_moe.moe.context import TokenContext
from mm_moe.moe.layer import RoutingRecord

POSITION_STD = 0.02


@dataclasses.dataclass(frozen=True)
class SequencesSettings:
    """Shape of the towers.

    Attributes:
        width: width of every tower.
        num_blocks: blocks of each tower.
        num_heads: attention heads.
        hidden: width inside a feed-forward.
        projection: width of the features.
        sequences: modality -> {"width", "length", "mean", "std"} of its raw steps; a run fills it
            in from the data.
    """

    width: int = 64
    num_blocks: int = 4
    num_heads: int = 4
    hidden: int = 256
    projection: int = 64
    sequences: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("width", "num_blocks", "num_heads", "hidden", "projection"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"sequences.{name} ({value!r}) must be a positive integer.")
        if self.width % self.num_heads:
            raise ConfigError(
                f"sequences.width ({self.width}) must be a multiple of num_heads "
                f"({self.num_heads})."
            )
        if not self.sequences:
            raise ConfigError(
                "the backbone 'sequences' needs the widths of the data; take a data set of feature "
                "sequences (such as cmu_mosi), or give backbone_config.sequences."
            )
        for name, about in self.sequences.items():
            if not all(isinstance(about.get(k), int) and about[k] > 0 for k in ("width", "length")):
                raise ConfigError(
                    f"sequences.sequences[{name!r}] needs a width and a length above 0, it has "
                    f"width {about.get('width')!r} and length {about.get('length')!r}."
                )

    def needs(self) -> dict[str, SequenceNeeds]:
        """What each modality's processor needs."""
        return {
            name: SequenceNeeds(
                about["width"], about["length"], about.get("mean"), about.get("std")
            )
            for name, about in self.sequences.items()
        }


class SequenceBlock(nn.Module):
    """One pre-norm block: attention, then a feed-forward that may be made sparse."""

    def __init__(self, *, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp: nn.Module = nn.Sequential(
            OrderedDict(fc1=nn.Linear(width, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, width))
        )


class SequenceTower(Tower):
    """One modality; payload: values (N, L, raw width) and mask bool (N, L), True on real steps."""

    def __init__(self, settings: SequencesSettings, *, raw_width: int, length: int) -> None:
        super().__init__()
        self.width, self.num_heads = settings.width, settings.num_heads
        self.out_width, self.num_blocks = settings.projection, settings.num_blocks
        self.raw_width = raw_width
        self.project_in = nn.Linear(raw_width, self.width)
        self.position = nn.Embedding(length, self.width)
        nn.init.normal_(self.position.weight, std=POSITION_STD)
        self.blocks = nn.ModuleList(
            SequenceBlock(width=self.width, hidden=settings.hidden) for _ in range(self.num_blocks)
        )
        self.norm_out = nn.LayerNorm(self.width)
        self.project_out = nn.Linear(self.width, self.out_width, bias=False)

    def embed(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Projected steps with their positions."""
        values_NLD = payload["values"]
        if values_NLD.shape[2] != self.raw_width:
            raise ConfigError(
                f"the tower takes steps of width {self.raw_width}, the batch has "
                f"{values_NLD.shape[2]}; use this model's own data."
            )
        check_length(values_NLD.shape[1], self.position.num_embeddings)
        positions_LD = self.position.weight[: values_NLD.shape[1]]
        return self.project_in(values_NLD) + positions_LD, payload["mask"]

    def block(
        self,
        index: int,
        x_NLD: Tensor,
        mask_NL: Tensor | None = None,
        keys_values: tuple[Tensor, Tensor] | None = None,
        context: TokenContext | None = None,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, RoutingRecord | None]:
        """One block; no step attends to padding, and padding is not routed."""
        block: Any = self.blocks[index]
        attended_NLD = attend(
            *block.qkv(block.norm1(x_NLD)).chunk(3, dim=-1),
            num_heads=self.num_heads,
            extra=keys_values,
            mask_NL=mask_NL,
        )
        x_NLD = x_NLD + block.out(attended_NLD)
        y_NLD, record = run_feed_forward(block.mlp, block.norm2(x_NLD), mask_NL, context)
        return x_NLD + y_NLD, record

    def pool(self, x_NLD: Tensor, payload: Payload, prefix: int) -> Tensor:
        """Mean over the real steps, normalised and projected."""
        weight_NL1 = payload["mask"].unsqueeze(-1)
        # `where`, not a product: what stands on padding may be anything.
        real_NLD = torch.where(weight_NL1, x_NLD[:, prefix:], 0.0)
        mean_ND = real_NLD.sum(1) / weight_NL1.sum(1).clamp(min=1)
        return self.project_out(self.norm_out(mean_ND))

    def blank(self) -> Payload:
        """One step of zeros."""
        weight = self.project_in.weight
        return {
            "values": weight.new_zeros(1, 1, self.raw_width),
            "mask": torch.ones(1, 1, dtype=torch.bool, device=weight.device),
        }

    def stand_in(self, num_rows: int, length: int) -> Payload:
        """Rows whose steps are all real."""
        device = self.project_in.weight.device
        return {"mask": torch.ones(num_rows, length, dtype=torch.bool, device=device)}

    def feed_forwards(self) -> list[tuple[nn.Module, str]]:
        """`mlp` of every block."""
        return [(block, "mlp") for block in self.blocks]


class SequencesBackbone(Backbone):
    """One `SequenceTower` per modality, for any number of them.

    Args:
        settings: fields of `SequencesSettings` that differ from its defaults.
        modalities: which of `settings["sequences"]` to build, and their order.
    """

    # The usual names; any name in `sequences` will do.
    supported: ClassVar[tuple[str, ...]] = ("text", "audio", "vision")
    takes_sequences: ClassVar[bool] = True

    def __init__(self, settings: dict[str, Any], *, modalities: tuple[str, ...]) -> None:
        shape = _settings(settings)
        check_modalities(modalities, tuple(shape.sequences))
        self.supported = tuple(shape.sequences)  # type: ignore[misc]
        super().__init__(dataclasses.asdict(shape), modalities=modalities)
        self.set_towers(
            {
                name: SequenceTower(shape, raw_width=need.width, length=need.length)
                for name, need in shape.needs().items()
                if name in modalities
            }
        )

    @classmethod
    def processor_needs(cls, settings: dict[str, Any]) -> ProcessorNeeds:
        """Widths, lengths and the training data's mean and spread."""
        return ProcessorNeeds(sequences=_settings(settings).needs())


def _settings(settings: dict[str, Any]) -> SequencesSettings:
    known = [field.name for field in dataclasses.fields(SequencesSettings)]
    check_options("sequences", settings, known)
    return SequencesSettings(**settings)
