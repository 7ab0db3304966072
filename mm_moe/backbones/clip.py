"""CLIP as towers: `transformers`' CLIPModel taken apart into its own modules.

Axes: N rows, L tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPVisionModel

from mm_moe.backbones.attention import attend
from mm_moe.backbones.base import Backbone, Payload, ProcessorNeeds, Tower, run_feed_forward
from mm_moe.backbones.inputs import (
    blank_image,
    check_length,
    check_pixels,
    ends_last,
    one_token,
)
from mm_moe.backbones.library import (
    check_same_settings,
    json_fields,
    library_config,
    read_library_model,
)
from mm_moe.batch import IMAGE, TEXT
from mm_moe.moe.context import TokenContext
from mm_moe.moe.layer import RoutingRecord

LEGACY_EOS = 2  # configs from before the id was stored right: the largest id of a row is its end


class ClipTower(Tower):
    """The part that the towers of CLIP and SigLIP share: pre-norm blocks of the library's own."""

    layers: nn.ModuleList

    def __init__(self, encoder: Any, *, out_width: int) -> None:
        super().__init__()
        self.layers = encoder.encoder.layers
        self.width = encoder.config.hidden_size
        self.out_width = out_width
        self.num_blocks = len(self.layers)

    def block(
        self,
        index: int,
        x_NLD: Tensor,
        mask_NL: Tensor | None = None,
        keys_values: tuple[Tensor, Tensor] | None = None,
        context: TokenContext | None = None,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, RoutingRecord | None]:
        """One pre-norm block. The mask only decides which tokens a sparse feed-forward routes.

        Attention needs no padding mask: images have no padding, CLIP's text is padded on the right,
        where the causal order already hides it from every real token, and SigLIP reads its padding.
        """
        layer: Any = self.layers[index]
        y_NLD = layer.layer_norm1(x_NLD)
        if keys_values is None:
            y_NLD, _ = layer.self_attn(y_NLD, attention_mask=None, is_causal=self.causal)
        else:
            attention = layer.self_attn
            y_NLD = attend(
                attention.q_proj(y_NLD),
                attention.k_proj(y_NLD),
                attention.v_proj(y_NLD),
                num_heads=attention.num_heads,
                extra=keys_values,
                causal=self.causal,
                dropout=attention.dropout if attention.training else 0.0,
            )
            y_NLD = attention.out_proj(y_NLD)
        x_NLD = x_NLD + y_NLD
        y_NLD, record = run_feed_forward(layer.mlp, layer.layer_norm2(x_NLD), mask_NL, context)
        return x_NLD + y_NLD, record

    def feed_forwards(self) -> list[tuple[nn.Module, str]]:
        """`mlp` of every layer."""
        return [(layer, "mlp") for layer in self.layers]


class ClipImageTower(ClipTower):
    """CLIP's vision transformer; payload: pixel_values (N, 3, H, W)."""

    def __init__(self, encoder: CLIPVisionModel, projection: nn.Linear) -> None:
        super().__init__(encoder, out_width=projection.out_features)
        self.projection = projection
        # The embedding's modules without the embedding: it has a buffer that no checkpoint holds.
        self.class_embedding = encoder.embeddings.class_embedding
        self.patch_embedding = encoder.embeddings.patch_embedding
        self.position_embedding = encoder.embeddings.position_embedding
        self.norm_in = encoder.pre_layrnorm
        self.norm_out = encoder.post_layernorm
        self.image_size: int = encoder.embeddings.image_size  # type: ignore[assignment]

    def embed(self, payload: Payload) -> tuple[Tensor, None]:
        """Class token and patches, with positions, normalised."""
        pixels_NCHW = payload["pixel_values"]
        check_pixels(pixels_NCHW, self.image_size)
        patches = self.patch_embedding(pixels_NCHW.to(self.patch_embedding.weight.dtype))
        patches_NLD = patches.flatten(2).transpose(1, 2)
        class_N1D = self.class_embedding.expand(len(patches_NLD), 1, -1)
        x_NLD = torch.cat([class_N1D, patches_NLD], dim=1) + self.position_embedding.weight
        return self.norm_in(x_NLD), None

    def pool(self, x_NLD: Tensor, payload: Payload, prefix: int) -> Tensor:
        """The class token, normalised and projected."""
        return self.projection(self.norm_out(x_NLD[:, prefix]))

    def stand_in(self, num_rows: int, length: int) -> Payload:
        """Nothing: the class token's place is known."""
        return {}

    def anchor(self) -> Tensor:
        """The class token."""
        return self.class_embedding.detach()

    def blank(self) -> Payload:
        """One black image."""
        weight = self.patch_embedding.weight
        return blank_image(weight, self.image_size, channels=weight.shape[1])


class ClipTextTower(ClipTower):
    """CLIP's text transformer; payload: input_ids and attention_mask (N, L), right-padded."""

    causal = True

    def __init__(self, encoder: CLIPTextModel, projection: nn.Linear) -> None:
        super().__init__(encoder, out_width=projection.out_features)
        self.projection = projection
        self.token_embedding = encoder.embeddings.token_embedding
        self.position_embedding = encoder.embeddings.position_embedding
        self.norm_out = encoder.final_layer_norm
        self.eos_token_id: int = encoder.config.eos_token_id  # type: ignore[assignment]

    def embed(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Token plus position embeddings; the mask is the tokenizer's."""
        ids_NL = payload["input_ids"]
        length, positions = ids_NL.shape[1], self.position_embedding.num_embeddings
        check_length(length, positions)
        x_NLD = self.token_embedding(ids_NL) + self.position_embedding.weight[:length]
        return x_NLD, payload["attention_mask"].bool()

    def pool(self, x_NLD: Tensor, payload: Payload, prefix: int) -> Tensor:
        """The first end-of-text token, normalised and projected."""
        ids_NL = payload["input_ids"]
        if self.eos_token_id == LEGACY_EOS:
            end_N = ids_NL.argmax(-1)
        else:
            end_N = (ids_NL == self.eos_token_id).int().argmax(-1)
        rows_N = torch.arange(len(ids_NL), device=ids_NL.device)
        return self.projection(self.norm_out(x_NLD[rows_N, end_N + prefix]))

    def stand_in(self, num_rows: int, length: int) -> Payload:
        """Texts that end at their last token."""
        end = self.token_embedding.num_embeddings - 1
        end = end if self.eos_token_id == LEGACY_EOS else self.eos_token_id
        return {"input_ids": ends_last(num_rows, length, end, self.token_embedding.weight.device)}

    def anchor(self) -> Tensor:
        """The end-of-text token."""
        end = -1 if self.eos_token_id == LEGACY_EOS else self.eos_token_id
        return self.token_embedding.weight[end].detach()

    def blank(self) -> Payload:
        """A row that is only an end-of-text token."""
        return one_token(self.token_embedding.weight.device, token=self.eos_token_id)


class BorrowingTextTower(ClipTextTower):
    """A text tower without blocks of its own: its tokens go through those of another tower.

    LIMoE's one tower (Mustafa et al. 2022): routers and experts are those of both modalities, while
    embeddings, positions, the last norm and the projection are each modality's own. Theirs reads
    all tokens in both directions and takes their mean; ours stays CLIP's, causal in texts, with the
    class token and the end of the text.

    Args:
        encoder: the library's, whose blocks are dropped.
        projection: from the last token to the feature.
        lender: the tower with the blocks, of equal width.
    """

    def __init__(self, encoder: CLIPTextModel, projection: nn.Linear, *, lender: ClipTower) -> None:
        super().__init__(encoder, projection)
        del self.layers
        self._lender = (lender,)  # in a tuple, so that it is no submodule

    @property
    def layers(self) -> nn.ModuleList:  # type: ignore[override]
        """The other tower's blocks: parameters are counted, trained and saved once, there."""
        return self._lender[0].layers


def clip_config(settings: dict[str, Any]) -> CLIPConfig:
    """CLIPConfig from a dict of its fields, with errors a user can act on."""
    return library_config(CLIPConfig, settings)


class ClipBackbone(Backbone):
    """Any CLIP that `transformers` reads: a folder, a Hub name, or a config for random weights.

    Args:
        settings: the fields of CLIPConfig (text_config, vision_config, projection_dim, ...).
        modalities: towers to keep, of "image" and "text".
        clip: a ready CLIPModel to take apart instead of a new random one.
        one_tower: texts go through the image tower's blocks; both towers are of one width.
    """

    supported = (IMAGE, TEXT)

    def __init__(
        self,
        settings: dict[str, Any],
        *,
        modalities: tuple[str, ...] = (IMAGE, TEXT),
        clip: CLIPModel | None = None,
        one_tower: bool = False,
    ) -> None:
        super().__init__(settings, modalities=modalities)
        if clip is None:
            clip = CLIPModel(clip_config(self.settings))
        image = ClipImageTower(clip.vision_model, clip.visual_projection)
        text = (clip.text_model, clip.text_projection)
        if one_tower and {IMAGE, TEXT} <= set(self.parts.values()):
            towers: dict[str, Tower] = {TEXT: BorrowingTextTower(*text, lender=image)}
        else:
            towers = {TEXT: ClipTextTower(*text)}
        self.set_towers({IMAGE: image, **towers})

    @classmethod
    def processor_needs(cls, settings: dict[str, Any]) -> ProcessorNeeds:
        """Sizes from the config; a tokenizer must come with the weights."""
        return needs_of(clip_config(settings))

    @classmethod
    def load(
        cls, pretrained: str, *, settings: dict[str, Any], modalities: tuple[str, ...]
    ) -> ClipBackbone:
        """Read a CLIP checkpoint from a folder or the Hub; its own config replaces `settings`.

        Raises:
            ConfigError: `settings` are given as well and say something else.
            CheckpointError: nothing readable under that name.
        """
        clip = read_library_model(CLIPModel, pretrained, kind="CLIP")
        own = json_fields(clip.config)
        check_same_settings(settings, own, pretrained)
        return cls(own, modalities=modalities, clip=clip)


def needs_of(config: CLIPConfig, source: str | None = None) -> ProcessorNeeds:
    """What a CLIP of this config takes in; `source` holds a tokenizer that comes with it."""
    vision: Any = config.vision_config
    text: Any = config.text_config
    return ProcessorNeeds(
        image_size=vision.image_size,
        max_text_tokens=text.max_position_embeddings,
        vocab_size=text.vocab_size,
        source=source,
    )
