"""An image tower of one backbone beside a text tower of another, projected to one width."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mm_moe.backbones.base import Backbone, Edit, Payload, ProcessorNeeds, Tower, check_options
from mm_moe.backbones.entrance import Generated
from mm_moe.batch import IMAGE, TEXT
from mm_moe.errors import ConfigError
from mm_moe.moe.context import TokenContext
from mm_moe.moe.layer import RoutingRecord
from mm_moe.registry import BACKBONES

OPTIONS = [IMAGE, TEXT, "width"]
PART_OPTIONS = ["backbone", "config", "pretrained", "source"]


class DualBackbone(Backbone):
    """Towers of two backbones, each followed by a new linear layer to the common width.

    The projections are no part of the towers: locking a tower leaves its projection trainable.

    Args:
        settings: modality -> {"backbone": a registered name, "config": its settings, "pretrained":
            weights that its `load` takes}, and "width" of the features (default 256). The settings
            of a built backbone hold the complete configs, and "source" where weights were, for
            the tokenizer.
        modalities: towers to build, of "image" and "text".

    Raises:
        ConfigError: an unknown part, or a backbone without the modality it is to give.
        CheckpointError: weights that cannot be read.
    """

    supported = (IMAGE, TEXT)

    def __init__(
        self, settings: dict[str, Any], *, modalities: tuple[str, ...] = (IMAGE, TEXT)
    ) -> None:
        check_options("dual", settings, OPTIONS)
        super().__init__(settings, modalities=modalities)
        width = settings.get("width", 256)
        if not isinstance(width, int) or width < 1:
            raise ConfigError(f"backbone_config.width ({width!r}) must be a positive integer.")
        self.width = width
        towers: dict[str, Tower] = {}
        for name in self.first_names:
            part = part_of(settings, name)
            built = build_part(part, name)
            towers[name] = built.towers[name]  # type: ignore[assignment]
            source = part.get("pretrained", part.get("source"))
            self.settings[name] = {"backbone": part["backbone"], "config": built.settings}
            self.settings[name] |= {"source": source} if source else {}
        self.settings["width"] = width
        self.set_towers(towers)
        self.projections = nn.ModuleDict(
            {name: nn.Linear(towers[name].out_width, width) for name in towers}
        )

    @property
    def out_width(self) -> int:
        """The common width."""
        return self.width

    def encode(
        self,
        modality: str,
        payload: Payload | None,
        edit: Edit | None = None,
        context: TokenContext | None = None,
        generated: Generated | None = None,
    ) -> tuple[Tensor, dict[str, RoutingRecord]]:
        """The tower's features, projected; see `Backbone.encode`."""
        feature_ND, records = super().encode(modality, payload, edit, context, generated)
        return self.projections[self.parts[modality]](feature_ND), records

    @classmethod
    def processor_needs(cls, settings: dict[str, Any]) -> ProcessorNeeds:
        """Those of the image tower for images, those of the text tower for texts."""
        found = {}
        for name in (IMAGE, TEXT):
            if name in settings:
                part = part_of(settings, name)
                kind = BACKBONES.resolve(part["backbone"])
                found[name] = kind.processor_needs(part.get("config", {}))
        image, text = (found.get(name, ProcessorNeeds()) for name in (IMAGE, TEXT))
        part = settings.get(TEXT, {})
        return ProcessorNeeds(
            image_size=image.image_size,
            max_text_tokens=text.max_text_tokens,
            vocab_size=text.vocab_size,
            source=part.get("pretrained") or part.get("source") or text.source,
            tokenizer=text.tokenizer,
            image_mean=image.image_mean,
            image_std=image.image_std,
        )


def part_of(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """The settings of one tower.

    Raises:
        ConfigError: it is missing, is no object, or names no backbone.
    """
    part = settings.get(name)
    if not isinstance(part, dict) or "backbone" not in part:
        raise ConfigError(
            f"dual needs backbone_config.{name} with a backbone, such as "
            f'{{"{name}": {{"backbone": "clip", "pretrained": "FOLDER"}}}}; got {part!r}.'
        )
    check_options(f"dual.{name}", part, PART_OPTIONS)
    return part


def build_part(part: dict[str, Any], name: str) -> Backbone:
    """The backbone that gives one tower."""
    kind = BACKBONES.resolve(part["backbone"])
    config = part.get("config", {})
    if part.get("pretrained"):
        return kind.load(part["pretrained"], settings=config, modalities=(name,))
    return kind(config, modalities=(name,))
