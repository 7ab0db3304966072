"""Clinical data: tables, genomes, volumes, series, events and notes, each to P tokens of width H.

A modality's feature is its P tokens side by side, (N, P * H), so that a fill can put tokens in the
place of a missing modality and the fusion `transformer` can attend to each of them.

Axes: N rows, P tokens, H width of a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

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
)
from mm_moe.backbones.clinical_library import (
    NoteEncoder,
    PictureEncoder,
    SliceEncoder,
    part_needs,
    split_part,
)
from mm_moe.backbones.clinical_series import EventBins, EventSet, GruTokens, PatchTokens
from mm_moe.backbones.clinical_tokens import (
    DosageEncoder,
    RawInput,
    TokenEncoder,
    TokenShape,
    VectorEncoder,
    run_block,
)
from mm_moe.backbones.clinical_volume import VolumeEncoder
from mm_moe.backbones.sequences import SequenceBlock
from mm_moe.batch import IMAGE, TEXT, base_modality
from mm_moe.errors import ConfigError
from mm_moe.moe.context import TokenContext
from mm_moe.moe.layer import RoutingRecord
from mm_moe.registry import nearest

KINDS: Mapping[str, type[TokenEncoder]] = MappingProxyType(
    {
        "table": VectorEncoder,
        "dosage": DosageEncoder,
        "volume": VolumeEncoder,
        "slice_vit": SliceEncoder,
        "gru": GruTokens,
        "patches": PatchTokens,
        "event_set": EventSet,
        "event_bins": EventBins,
        "text": NoteEncoder,
        "image": PictureEncoder,
    }
)
HAS_INNER = ("slice_vit", "text", "image")  # kinds that run a tower of another backbone
UNSCALED = ("dosage", "event_set", "event_bins")  # kinds that take raw values
PICTURE = ("slice_vit", "image")


@dataclasses.dataclass(frozen=True)
class ClinicalSettings:
    """Shape of the towers.

    Attributes:
        num_tokens: P, the same for every modality.
        token_width: H.
        num_blocks: transformer blocks over the P tokens of each tower, whose feed-forwards experts
            can replace; 0: the encoders alone.
        num_heads: attention heads.
        block_hidden: width inside a block's feed-forward; 0: 2 H.
        dropout: of the channels of a volume's convolutions, in training.
        towers: modality -> {"kind": one of `KINDS`, and that encoder's options}. Kinds "text",
            "image" and "slice_vit" also take "backbone" (default small_clip), "config" and
            "pretrained" of the backbone whose tower they run. Without a kind: "table" for a
            sequence of one step or an array (D,), "event_set" for events, "gru" for other
            sequences, "volume" for arrays of places, and "text" and "image" by name.
        sequences: modality -> {"width", "length", "mean", "std", "events"}; a run fills it in from
            the data.
        arrays: modality -> {"shape", "scale", "mean"}; likewise.
    """

    num_tokens: int = 16
    token_width: int = 128
    num_blocks: int = 0
    num_heads: int = 4
    block_hidden: int = 0
    dropout: float = 0.2
    towers: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    sequences: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    arrays: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        least = {"num_tokens": 1, "token_width": 1, "num_heads": 1, "num_blocks": 0}
        for name, least_value in {**least, "block_hidden": 0}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least_value:
                raise ConfigError(
                    f"clinical.{name} ({value!r}) must be a whole number, at least {least_value}."
                )
        if self.token_width % self.num_heads:
            raise ConfigError(
                f"clinical.token_width ({self.token_width}) must be a multiple of num_heads "
                f"({self.num_heads})."
            )
        known = isinstance(self.dropout, int | float) and not isinstance(self.dropout, bool)
        if not known or not 0 <= self.dropout < 1:
            raise ConfigError(f"clinical.dropout ({self.dropout!r}) must lie in [0, 1).")
        for name in ("towers", "sequences", "arrays"):
            if not isinstance(getattr(self, name), dict):
                raise ConfigError(
                    f"clinical.{name} ({getattr(self, name)!r}) must be an object by modality."
                )
        for name, options in self.towers.items():
            if not isinstance(options, dict):
                raise ConfigError(
                    f'clinical.towers.{name} ({options!r}) must be an object such as {{"kind": '
                    '"table"}.'
                )

    @property
    def modalities(self) -> tuple[str, ...]:
        """Every modality that something is said about, and notes and pictures, which are known."""
        return tuple({**self.arrays, **self.sequences, **self.towers, TEXT: {}, IMAGE: {}})

    @property
    def tokens(self) -> TokenShape:
        """What every encoder gives."""
        return TokenShape(self.num_tokens, self.token_width, self.num_heads, self.dropout)

    def raw(self, name: str) -> RawInput:
        """What the rows of a modality are."""
        if name in self.arrays:
            return RawInput(name, tuple(self.arrays[name]["shape"]))
        if name in self.sequences:
            about = self.sequences[name]
            shape = (about["length"], about["width"])
            return RawInput(name, shape, sequence=True, events=about.get("events") or {})
        return RawInput(name)

    def options(self, name: str) -> dict[str, Any]:
        """The options of a modality's tower; `text_1` has those of `text`."""
        known = name if name in self.towers else base_modality(name)
        return dict(self.towers.get(known, {}))

    def kind(self, name: str) -> str:
        """Which encoder a modality has.

        Raises:
            ConfigError: an unknown one, or none that fits what is known of the modality.
        """
        kind = self.options(name).get("kind") or _kind(self.raw(name))
        if not isinstance(kind, str) or kind not in KINDS:
            words = nearest(str(kind), list(KINDS))
            raise ConfigError(f"clinical.towers.{name}: unknown kind {kind!r}; {words}")
        return kind


def _kind(raw: RawInput) -> str:
    """An encoder for rows of this form."""
    if not raw.shape:
        if base_modality(raw.name) in (TEXT, IMAGE):
            return base_modality(raw.name)
        raise ConfigError(
            f"clinical: the data say nothing of {raw.name!r}; take a data set of arrays or "
            f"sequences, or give backbone_config.sequences.{raw.name} or .arrays.{raw.name}."
        )
    if raw.events:
        return "event_set"
    if raw.sequence:
        return "table" if raw.shape[0] == 1 else "gru"
    return "table" if len(raw.shape) == 1 else "volume"


class ClinicalTower(Tower):
    """An encoder and transformer blocks over its P tokens."""

    def __init__(self, encoder: TokenEncoder, settings: ClinicalSettings) -> None:
        super().__init__()
        self.encoder = encoder
        self.width, self.num_heads = settings.token_width, settings.num_heads
        self.num_tokens = settings.num_tokens
        self.out_width, self.num_blocks = self.num_tokens * self.width, settings.num_blocks
        self.blocks = nn.ModuleList(
            SequenceBlock(width=self.width, hidden=settings.block_hidden or 2 * self.width)
            for _ in range(self.num_blocks)
        )

    def embed(self, payload: Payload) -> tuple[Tensor, None]:
        """The encoder's P tokens, all of them real."""
        return self.encoder(payload), None

    def block(
        self,
        index: int,
        x_NLD: Tensor,
        mask_NL: Tensor | None = None,
        keys_values: tuple[Tensor, Tensor] | None = None,
        context: TokenContext | None = None,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, RoutingRecord | None]:
        """One pre-norm transformer block."""
        return run_block(
            self.blocks[index],  # type: ignore[arg-type]
            x_NLD,
            num_heads=self.num_heads,
            mask_NL=mask_NL,
            keys_values=keys_values,
            context=context,
        )

    def pool(self, x_NLD: Tensor, payload: Payload, prefix: int) -> Tensor:
        """The P tokens side by side."""
        return x_NLD[:, prefix:].flatten(1)

    def blank(self) -> Payload:
        """The encoder's."""
        return self.encoder.blank()

    def new_parts(self) -> list[nn.Module]:
        """What stands behind an inner tower, which may be pretrained."""
        return self.encoder.new_parts()

    def feed_forwards(self) -> list[tuple[nn.Module, str]]:
        """`mlp` of every block."""
        return [(block, "mlp") for block in self.blocks]


class ClinicalBackbone(Backbone):
    """One `ClinicalTower` per modality.

    Args:
        settings: fields of `ClinicalSettings` that differ from its defaults.
        modalities: which to build, and their order.

    Attributes:
        num_tokens: P.
        token_width: H.
    """

    # The usual names; any name that the settings or the data know will do.
    supported: ClassVar[tuple[str, ...]] = ("table", "genomic", "volume", "series", "events")
    takes_sequences: ClassVar[bool] = True
    takes_arrays: ClassVar[bool] = True

    def __init__(self, settings: dict[str, Any], *, modalities: tuple[str, ...]) -> None:
        shape = _settings(settings)
        check_modalities(modalities, shape.modalities)
        _check_towers(shape, modalities)
        self.supported = shape.modalities  # type: ignore[misc]
        super().__init__(dataclasses.asdict(shape), modalities=modalities)
        self.num_tokens, self.token_width = shape.num_tokens, shape.token_width
        towers: dict[str, Tower] = {}
        for name in self.first_names:
            encoder = _encoder(shape, name)
            if shape.kind(name) in HAS_INNER:
                own = {k: v for k, v in shape.options(name).items() if k != "pretrained"}
                self.settings["towers"][name] = {**own, **encoder.part}  # type: ignore[dict-item]
            towers[name] = ClinicalTower(encoder, shape)
        self.set_towers(towers)

    @classmethod
    def processor_needs(cls, settings: dict[str, Any]) -> ProcessorNeeds:
        """Widths and statistics of sequences, shapes of arrays, and what inner towers take in."""
        shape = _settings(settings)
        found: dict[str, Any] = {}
        for name in shape.towers:
            if shape.kind(name) == TEXT:
                part = split_part(shape.options(name))[0]
                needs = part_needs(part)
                found |= {key: getattr(needs, key) for key in ("max_text_tokens", "vocab_size")}
                found["tokenizer"] = needs.tokenizer
                found["source"] = part.get("pretrained") or part.get("source") or needs.source
            elif shape.kind(name) == IMAGE:
                needs = part_needs(split_part(shape.options(name))[0])
                keys = ("image_size", "image_mean", "image_std")
                found |= {key: getattr(needs, key) for key in keys}
        return ProcessorNeeds(
            sequences={name: _sequence(shape, name) for name in shape.sequences},
            arrays={name: _array(shape, name) for name in shape.arrays},
            **found,
        )


def _check_towers(shape: ClinicalSettings, modalities: tuple[str, ...]) -> None:
    """ConfigError for options of a modality that neither the data nor the model know."""
    known = [*{**shape.sequences, **shape.arrays, TEXT: {}, IMAGE: {}}, *modalities]
    for name in shape.towers:
        if name not in known and base_modality(name) == name:
            raise ConfigError(
                f"clinical.towers has options for {name!r}, and there is no such modality; "
                f"{nearest(name, sorted({*modalities, *shape.sequences, *shape.arrays}))}"
            )


def _sequence(shape: ClinicalSettings, name: str) -> SequenceNeeds:
    about = shape.sequences[name]
    raw = shape.kind(name) in UNSCALED
    mean, std = (None, None) if raw else (about.get("mean"), about.get("std"))
    return SequenceNeeds(about["width"], about["length"], mean, std)


def _array(shape: ClinicalSettings, name: str) -> ArrayNeeds:
    about = shape.arrays[name]
    if shape.kind(name) in UNSCALED:
        return ArrayNeeds(tuple(about["shape"]))
    return ArrayNeeds(tuple(about["shape"]), about.get("scale", 1.0), about.get("mean", 0.0))


def _encoder(shape: ClinicalSettings, name: str) -> TokenEncoder:
    """The encoder of one modality.

    Raises:
        ConfigError: options that it does not have, or that cannot work.
    """
    options = shape.options(name)
    options.pop("kind", None)
    kind = shape.kind(name)
    encoder_class: Any = KINDS[kind]
    parts: dict[str, Any] = {}
    if kind in HAS_INNER:
        parts["part"], options = split_part(options)
    check_options(f"clinical.towers.{name}", options, list(encoder_class.options))
    for option, value in options.items():
        least = encoder_class.options[option]
        if not isinstance(value, int) or value < least:
            raise ConfigError(
                f"clinical.towers.{name}.{option} ({value!r}) must be a whole number, at least "
                f"{least}."
            )
    encoder: TokenEncoder = encoder_class(shape.raw(name), shape.tokens, **parts, **options)
    return encoder


def _settings(settings: dict[str, Any]) -> ClinicalSettings:
    known = [field.name for field in dataclasses.fields(ClinicalSettings)]
    check_options("clinical", settings, known)
    return ClinicalSettings(**settings)
