"""SigLIP as towers: `transformers`' SiglipModel taken apart into its own modules.

Its blocks are CLIP's. What differs: images have no class token and are pooled by an attention head;
texts are not causal, always as long as the tower has positions, with padding that is attended to,
and are pooled at the last position, whatever stands there.

Axes: N rows, L tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import SiglipConfig, SiglipModel, SiglipTextModel, SiglipVisionModel

from mm_moe.backbones.base import Backbone, Payload, ProcessorNeeds
from mm_moe.backbones.clip import ClipTower
from mm_moe.backbones.inputs import blank_image, check_length, check_pixels, one_token
from mm_moe.backbones.library import (
    check_same_settings,
    json_fields,
    library_config,
    read_library_model,
)
from mm_moe.batch import IMAGE, TEXT
from mm_moe.errors import ConfigError

HALF = [0.5, 0.5, 0.5]  # SigLIP's normalisation: values in [-1, 1]


class SiglipImageTower(ClipTower):
    """SigLIP's vision transformer; payload: pixel_values (N, 3, H, W)."""

    def __init__(self, encoder: SiglipVisionModel) -> None:
        super().__init__(encoder, out_width=encoder.config.hidden_size)
        self.patch_embedding = encoder.embeddings.patch_embedding
        self.position_embedding = encoder.embeddings.position_embedding
        self.norm_out = encoder.post_layernorm
        self.head = encoder.head
        self.image_size: int = encoder.config.image_size  # type: ignore[assignment]

    def embed(self, payload: Payload) -> tuple[Tensor, None]:
        """Patches with positions."""
        pixels_NCHW = payload["pixel_values"]
        check_pixels(pixels_NCHW, self.image_size)
        patches = self.patch_embedding(pixels_NCHW.to(self.patch_embedding.weight.dtype))
        return patches.flatten(2).transpose(1, 2) + self.position_embedding.weight, None

    def pool(self, x_NLD: Tensor, payload: Payload, prefix: int) -> Tensor:
        """The library's attention head over the tower's own tokens."""
        return self.head(self.norm_out(x_NLD[:, prefix:]))

    def stand_in(self, num_rows: int, length: int) -> Payload:
        """Nothing: every token is read."""
        return {}

    def blank(self) -> Payload:
        """One grey image."""
        weight = self.patch_embedding.weight
        return blank_image(weight, self.image_size, channels=weight.shape[1])


class SiglipTextTower(ClipTower):
    """SigLIP's text transformer; payload: input_ids and attention_mask (N, L), right-padded.

    Rows are padded here to all positions of the tower, as the weights were trained, and every
    token counts as real: the feature does not depend on how long a batch was padded.
    """

    def __init__(self, encoder: SiglipTextModel) -> None:
        super().__init__(encoder, out_width=encoder.head.out_features)
        self.token_embedding = encoder.embeddings.token_embedding
        self.position_embedding = encoder.embeddings.position_embedding
        self.norm_out = encoder.final_layer_norm
        self.head = encoder.head
        self.pad_token_id: int = encoder.config.pad_token_id  # type: ignore[assignment]

    def embed(self, payload: Payload) -> tuple[Tensor, None]:
        """Token plus position embeddings of the row, padded to its full length."""
        ids_NL = payload["input_ids"].masked_fill(
            ~payload["attention_mask"].bool(), self.pad_token_id
        )
        length, positions = ids_NL.shape[1], self.position_embedding.num_embeddings
        check_length(length, positions)
        ids_NL = F.pad(ids_NL, (0, positions - length), value=self.pad_token_id)
        return self.token_embedding(ids_NL) + self.position_embedding.weight, None

    def pool(self, x_NLD: Tensor, payload: Payload, prefix: int) -> Tensor:
        """The last position, normalised and projected."""
        return self.head(self.norm_out(x_NLD[:, -1]))

    def stand_in(self, num_rows: int, length: int) -> Payload:
        """Nothing: the last token is read."""
        return {}

    def blank(self) -> Payload:
        """A row of padding."""
        return one_token(self.token_embedding.weight.device, token=self.pad_token_id)


def siglip_config(settings: dict[str, Any]) -> SiglipConfig:
    """SiglipConfig from a dict of its fields.

    Raises:
        ConfigError: not such fields, or towers whose features differ in width.
    """
    config = library_config(SiglipConfig, settings)
    image, text = config.vision_config, config.text_config
    if not image.vision_use_head:
        raise ConfigError(
            "vision_config.vision_use_head is false: without its head this SigLIP has no image "
            "feature; leave it true."
        )
    if image.hidden_size != text.projection_size:
        raise ConfigError(
            f"vision_config.hidden_size ({image.hidden_size}) must be text_config.projection_size "
            f"({text.projection_size}), the common width of the features."
        )
    return config


class SiglipBackbone(Backbone):
    """Any SigLIP that `transformers` reads: a folder, a Hub name, or a config for random weights.

    Args:
        settings: the fields of SiglipConfig (text_config, vision_config).
        modalities: towers to keep, of "image" and "text".
        siglip: a ready SiglipModel to take apart instead of a new random one.

    Raises:
        ConfigError: settings that are no SiglipConfig, or towers of two widths.
    """

    supported = (IMAGE, TEXT)

    def __init__(
        self,
        settings: dict[str, Any],
        *,
        modalities: tuple[str, ...] = (IMAGE, TEXT),
        siglip: SiglipModel | None = None,
    ) -> None:
        super().__init__(settings, modalities=modalities)
        config = siglip_config(self.settings)
        if siglip is None:
            siglip = SiglipModel(config)
        self.set_towers(
            {
                IMAGE: SiglipImageTower(siglip.vision_model),
                TEXT: SiglipTextTower(siglip.text_model),
            }
        )

    @classmethod
    def processor_needs(cls, settings: dict[str, Any]) -> ProcessorNeeds:
        """Sizes from the config; a tokenizer must come with the weights."""
        config: Any = siglip_config(settings)
        return ProcessorNeeds(
            image_size=config.vision_config.image_size,
            max_text_tokens=config.text_config.max_position_embeddings,
            vocab_size=config.text_config.vocab_size,
            image_mean=HALF,
            image_std=HALF,
        )

    @classmethod
    def load(
        cls, pretrained: str, *, settings: dict[str, Any], modalities: tuple[str, ...]
    ) -> SiglipBackbone:
        """Read a SigLIP checkpoint from a folder or the Hub; its own config replaces `settings`.

        Raises:
            ConfigError: `settings` are given as well and say something else.
            CheckpointError: nothing readable under that name.
        """
        siglip = read_library_model(SiglipModel, pretrained, kind="SigLIP")
        own = json_fields(siglip.config)
        check_same_settings(settings, own, pretrained)
        return cls(own, modalities=modalities, siglip=siglip)
