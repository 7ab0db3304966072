"""Small encoders by modality: an MLP for tables, a LeNet for images, a GRU for series.

The encoders are those of MultiBench and I2M2 (Madaan et al. 2024) for AV-MNIST and MIMIC-III. Each
gives one token per row; behind it may stand feed-forward blocks, which experts can replace. Any
modality may have any encoder; what it reads (widths, lengths, shapes) comes from the data.

Axes: N rows, L steps, D width, H x W places.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mm_moe.backbones.base import (
    ArrayNeeds,
    Backbone,
    Payload,
    ProcessorNeeds,
    SequenceNeeds,
    Tower,
    check_modalities,
    check_options,
    run_feed_forward,
)
from mm_moe.backbones.small_encoders import ENCODERS, Encoder
from mm_moe.errors import ConfigError
from mm_moe.moe.context import TokenContext
from mm_moe.moe.layer import RoutingRecord
from mm_moe.registry import nearest


@dataclasses.dataclass(frozen=True)
class SmallSettings:
    """Shape of the towers.

    Attributes:
        num_blocks: feed-forward blocks behind each encoder, which experts can replace; 0: the
            published encoders.
        block_hidden: width inside a block; 0: four times its width.
        towers: modality -> {"kind": "mlp", "cnn" or "gru", and that encoder's options}; what is not
            said is chosen by the data (see `_kind`).
        sequences: modality -> {"width", "length", "mean", "std"}; a run fills it in from the data.
        arrays: modality -> {"shape", "scale"}; likewise.
    """

    num_blocks: int = 0
    block_hidden: int = 0
    towers: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    sequences: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    arrays: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_hidden"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ConfigError(f"small.{name} ({value!r}) must be a whole number, at least 0.")
        if not self.modalities:
            raise ConfigError(
                "the backbone 'small' needs to know what the data are; take a data set of arrays "
                "or feature sequences (such as av_mnist), or give backbone_config.towers."
            )

    @property
    def modalities(self) -> tuple[str, ...]:
        """Every modality that something is said about."""
        return tuple({**self.arrays, **self.sequences, **self.towers})

    def raw_shape(self, name: str) -> tuple[int, ...]:
        """Shape of one row of a modality, without the rows' dimension.

        Raises:
            ConfigError: nothing is known about it.
        """
        if name in self.arrays:
            return tuple(self.arrays[name]["shape"])
        if name in self.sequences:
            return self.sequences[name]["length"], self.sequences[name]["width"]
        side = self.towers.get(name, {}).get("image_size")
        if not isinstance(side, int) or side < 1:
            raise ConfigError(
                f"small: the data hold no array or sequence {name!r}; if it is a picture, give "
                f"backbone_config.towers.{name}.image_size, its side in pixels."
            )
        return (3, side, side)


class SmallBlock(nn.Module):
    """Norm and feed-forward on one token."""

    def __init__(self, *, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp: nn.Module = nn.Sequential(
            OrderedDict(fc1=nn.Linear(width, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, width))
        )


class SmallTower(Tower):
    """An encoder and its blocks; payload: values (N, ...), mask (N, L) of sequences, or pixels."""

    attends = False

    def __init__(self, encoder: Encoder, *, num_blocks: int, hidden: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.width = self.out_width = encoder.out_width
        self.num_blocks = num_blocks
        self.blocks = nn.ModuleList(
            SmallBlock(width=self.width, hidden=hidden or 4 * self.width) for _ in range(num_blocks)
        )

    @property
    def image_size(self) -> int:
        """Side of the picture, where the modality is one."""
        return self.encoder.shape[-1]

    def embed(self, payload: Payload) -> tuple[Tensor, None]:
        """The encoder's output as one token."""
        return self.encoder(payload).unsqueeze(1), None

    def block(
        self,
        index: int,
        x_NLD: Tensor,
        mask_NL: Tensor | None = None,
        keys_values: tuple[Tensor, Tensor] | None = None,
        context: TokenContext | None = None,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, RoutingRecord | None]:
        """One residual feed-forward; there is no attention."""
        block: Any = self.blocks[index]
        y_NLD, record = run_feed_forward(block.mlp, block.norm(x_NLD), mask_NL, context)
        return x_NLD + y_NLD, record

    def pool(self, x_NLD: Tensor, payload: Payload, prefix: int) -> Tensor:
        """The token."""
        return x_NLD[:, prefix]

    def blank(self) -> Payload:
        """One row of zeros, marked as no real row for the batch normalisation."""
        weight = next(self.parameters())
        return {
            "values": weight.new_zeros(1, *self.encoder.shape),
            "blank": torch.ones(1, dtype=torch.bool, device=weight.device),
        }

    def feed_forwards(self) -> list[tuple[nn.Module, str]]:
        """`mlp` of every block."""
        return [(block, "mlp") for block in self.blocks]


class SmallBackbone(Backbone):
    """One `SmallTower` per modality; every modality's feature has its own width.

    Args:
        settings: fields of `SmallSettings` that differ from its defaults.
        modalities: which to build, and their order.
    """

    # The usual names; any name that the settings or the data know will do.
    supported: ClassVar[tuple[str, ...]] = ("static", "series", "image", "audio")
    takes_sequences: ClassVar[bool] = True
    takes_arrays: ClassVar[bool] = True

    def __init__(self, settings: dict[str, Any], *, modalities: tuple[str, ...]) -> None:
        shape = _settings(settings)
        check_modalities(modalities, shape.modalities)
        self.supported = shape.modalities  # type: ignore[misc]
        super().__init__(dataclasses.asdict(shape), modalities=modalities)
        self.set_towers({name: _tower(shape, name) for name in modalities})

    def feature_width(self, modality: str) -> int:
        """That of the modality's encoder."""
        return self.towers[modality].out_width  # type: ignore[return-value]

    @property
    def out_width(self) -> int:
        """The largest of the widths; see `feature_width`."""
        return max(self.feature_width(name) for name in self.modalities)

    @classmethod
    def processor_needs(cls, settings: dict[str, Any]) -> ProcessorNeeds:
        """Shapes and scales of arrays, widths and statistics of sequences, sides of pictures."""
        shape = _settings(settings)
        return ProcessorNeeds(
            image_size=shape.towers.get("image", {}).get("image_size", 0),
            sequences={
                name: SequenceNeeds(
                    about["width"], about["length"], about.get("mean"), about.get("std")
                )
                for name, about in shape.sequences.items()
            },
            arrays={
                name: ArrayNeeds(tuple(about["shape"]), about.get("scale", 1.0))
                for name, about in shape.arrays.items()
            },
        )


def _tower(shape: SmallSettings, name: str) -> SmallTower:
    options = dict(shape.towers.get(name, {}))
    raw = shape.raw_shape(name)
    kind = options.pop("kind", None) or _kind(raw, sequence=name in shape.sequences)
    options.pop("image_size", None)
    if kind not in ENCODERS:
        raise ConfigError(
            f"small.towers.{name}: unknown kind {kind!r}; {nearest(kind, list(ENCODERS))}"
        )
    encoder_class = ENCODERS[kind]
    check_options(f"small.towers.{name}", options, list(encoder_class.options))
    for option, value in options.items():
        least = encoder_class.options[option]
        if not isinstance(value, int) or value < least:
            raise ConfigError(
                f"small.towers.{name}.{option} ({value!r}) must be a whole number, at least "
                f"{least}."
            )
    encoder = encoder_class(raw, **options)
    return SmallTower(encoder, num_blocks=shape.num_blocks, hidden=shape.block_hidden)


def _kind(raw: tuple[int, ...], *, sequence: bool) -> str:
    """An encoder for rows of this shape: an MLP without steps or places to go over."""
    if len(raw) == 1 or (sequence and raw[0] == 1):
        return "mlp"
    return "gru" if sequence else "cnn"


def _settings(settings: dict[str, Any]) -> SmallSettings:
    known = [field.name for field in dataclasses.fields(SmallSettings)]
    check_options("small", settings, known)
    return SmallSettings(**settings)
