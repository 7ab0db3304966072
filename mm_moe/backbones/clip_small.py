"""The project's small CLIP: `transformers`' CLIP at a size that trains in minutes on a laptop."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import CLIPConfig, CLIPModel

from mm_moe.backbones.base import ProcessorNeeds, check_options
from mm_moe.backbones.clip import ClipBackbone, needs_of
from mm_moe.backbones.weights import load_weights
from mm_moe.batch import IMAGE, TEXT
from mm_moe.errors import CheckpointError, ConfigError

SMALL_CLIP_FOLDER = Path(__file__).parent / "small_clip"


@dataclasses.dataclass(frozen=True)
class SmallClipSettings:
    """Shape of the small CLIP; the defaults are those of the weights that come with the package.

    Attributes:
        image_size: side of the square image in pixels.
        patch_size: side of a patch in pixels; 16 gives 17 tokens, 8 gives 65.
        width: width of both towers.
        num_blocks: blocks of each tower.
        num_heads: attention heads.
        hidden: width inside a feed-forward.
        max_text_tokens: positions of the text tower, start and end marks included.
        vocab_size: tokens that the embedding has room for.
        projection: width of the features.
        one_tower: image and text tokens go through the same blocks, and so the same experts
            (LIMoE); embeddings, last norms and projections stay apart.
    """

    image_size: int = 64
    patch_size: int = 16
    width: int = 128
    num_blocks: int = 4
    num_heads: int = 4
    hidden: int = 512
    max_text_tokens: int = 24
    vocab_size: int = 4096
    projection: int = 128
    one_tower: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "one_tower":
                if not isinstance(value, bool):
                    raise ConfigError(f"small_clip.one_tower ({value!r}) must be true or false.")
                continue
            if not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"small_clip.{field.name} ({value!r}) must be a positive integer."
                )
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"small_clip.image_size ({self.image_size}) must be a multiple of patch_size "
                f"({self.patch_size}); try image_size="
                f"{self.patch_size * max(1, round(self.image_size / self.patch_size))}."
            )
        if self.width % self.num_heads:
            raise ConfigError(
                f"small_clip.width ({self.width}) must be a multiple of num_heads "
                f"({self.num_heads})."
            )

    def clip_config(self) -> CLIPConfig:
        """The same as a CLIPConfig. GELU, not CLIP's quick GELU: one fused kernel on a CPU."""
        shared = {
            "hidden_size": self.width,
            "intermediate_size": self.hidden,
            "num_hidden_layers": self.num_blocks,
            "num_attention_heads": self.num_heads,
            "projection_dim": self.projection,
            "hidden_act": "gelu",
        }
        text = {
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_text_tokens,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        }
        vision = {"image_size": self.image_size, "patch_size": self.patch_size}
        return CLIPConfig(
            text_config=shared | text,
            vision_config=shared | vision,
            projection_dim=self.projection,
        )


def small_settings(settings: dict[str, Any]) -> SmallClipSettings:
    """Settings from a dict of the fields that differ from the defaults; ConfigError if unknown."""
    known = [field.name for field in dataclasses.fields(SmallClipSettings)]
    check_options("small_clip", settings, known)
    return SmallClipSettings(**settings)


class SmallClipBackbone(ClipBackbone):
    """The small CLIP and its own tokenizer.

    Args:
        settings: fields of `SmallClipSettings` that differ from its defaults.
        modalities: towers to keep, of "image" and "text".
    """

    def __init__(
        self, settings: dict[str, int], *, modalities: tuple[str, ...] = (IMAGE, TEXT)
    ) -> None:
        small = small_settings(settings)
        super().__init__(
            settings,
            modalities=modalities,
            clip=CLIPModel(small.clip_config()),
            one_tower=small.one_tower,
        )
        self.settings = dataclasses.asdict(small)
        if not small.one_tower:  # as in checkpoints from before there was a choice
            del self.settings["one_tower"]

    @classmethod
    def processor_needs(cls, settings: dict[str, int]) -> ProcessorNeeds:
        """Sizes from the settings, and the tokenizer that comes with the package."""
        return needs_of(small_settings(settings).clip_config(), source=str(SMALL_CLIP_FOLDER))

    @classmethod
    def load(
        cls, pretrained: str, *, settings: dict[str, int], modalities: tuple[str, ...]
    ) -> SmallClipBackbone:
        """Weights that come with the package ("builtin"), or a file of `save_weights`.

        Raises:
            CheckpointError: the weights are not there or were made with other settings.
        """
        backbone = cls(settings, modalities=modalities)
        path = Path(pretrained)
        if pretrained == "builtin":
            path = SMALL_CLIP_FOLDER / "model.safetensors"
            if not path.is_file():
                raise CheckpointError(
                    "this installation has no built-in small_clip weights; train from scratch "
                    "(leave --pretrained out) or give a file of weights."
                )
        load_weights(backbone, path, names=backbone.first_names)
        return backbone
