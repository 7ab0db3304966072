"""CLIP models of `open_clip`, by name, with or without pretrained weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import open_clip
from open_clip.transformer import (
    CustomResidualAttentionBlock,
    QuickGELU,
    TextTransformer,
    VisionTransformer,
)
from torch import nn
from transformers import CLIPTokenizer

from mm_moe.backbones.base import Backbone, ProcessorNeeds, check_options
from mm_moe.backbones.openclip_towers import OpenClipImageTower, OpenClipTextTower, TextParts
from mm_moe.batch import IMAGE, TEXT
from mm_moe.errors import CheckpointError, ConfigError
from mm_moe.registry import nearest

OPTIONS = ["model", "model_cfg", "image_mean", "image_std"]


class OpenClipBackbone(Backbone):
    """A CLIP of `open_clip` by model name, optionally with pretrained weights.

    Args:
        settings: "model", a name of `open_clip.list_models()`, or "model_cfg", the fields of such a
            model; "image_mean" and "image_std" of its preprocessing.
        modalities: towers to keep, of "image" and "text".
        clip: a ready model to take apart instead of a new random one.

    Raises:
        ConfigError: an unknown model, or one whose towers are not a vision transformer and a causal
            text transformer.
    """

    supported = (IMAGE, TEXT)

    def __init__(
        self,
        settings: dict[str, Any],
        *,
        modalities: tuple[str, ...] = (IMAGE, TEXT),
        clip: nn.Module | None = None,
    ) -> None:
        fields = model_fields(settings)
        super().__init__(settings | {"model_cfg": fields}, modalities=modalities)
        if clip is None:
            custom = fields.get("custom_text", False)
            rest = {k: v for k, v in fields.items() if k != "custom_text"}
            clip = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**copy.deepcopy(rest))
        visual, text = towers_of(clip)
        self.set_towers({IMAGE: OpenClipImageTower(visual), TEXT: OpenClipTextTower(text)})

    @classmethod
    def processor_needs(cls, settings: dict[str, Any]) -> ProcessorNeeds:
        """Sizes of the model, normalisation of its weights, and CLIP's tokenizer."""
        fields = model_fields(settings)
        text = fields["text_cfg"]
        return ProcessorNeeds(
            image_size=fields["vision_cfg"].get("image_size", 224),
            max_text_tokens=text.get("context_length", 77),
            vocab_size=text.get("vocab_size", 49408),
            tokenizer=clip_tokenizer,
            image_mean=settings.get("image_mean"),
            image_std=settings.get("image_std"),
        )

    @classmethod
    def load(
        cls, pretrained: str, *, settings: dict[str, Any], modalities: tuple[str, ...]
    ) -> OpenClipBackbone:
        """Pretrained weights: a tag of the model, a file, or a folder with its own config.

        Raises:
            CheckpointError: nothing readable under that name.
        """
        folder = Path(pretrained).is_dir()
        name = f"local-dir:{pretrained}" if folder else settings.get("model", "")
        settings = {"model": name} if folder else dict(settings)
        fields = model_fields(settings)
        try:
            clip = open_clip.create_model(name, pretrained=None if folder else pretrained)
        except (RuntimeError, OSError, ValueError, KeyError) as error:
            text = (str(error).splitlines() or [type(error).__name__])[0]
            if pretrained in open_clip.list_pretrained_tags_by_model(name):
                raise CheckpointError(
                    f"the weights {pretrained!r} of {name!r} are not on this machine and could not "
                    "be fetched; fetch their file where there is a network and give it, as "
                    "--pretrained FILE."
                ) from error
            raise CheckpointError(
                f"no weights {pretrained!r} for the open_clip model {name!r} ({text}); tags: "
                f"{', '.join(open_clip.list_pretrained_tags_by_model(name)) or 'none'}, or a file."
            ) from error
        fields["quick_gelu"] = any(isinstance(module, QuickGELU) for module in clip.modules())
        own: dict[str, Any] = {"model_cfg": fields}
        for key, name_there in (("image_mean", "mean"), ("image_std", "std")):
            own[key] = list(clip.visual.preprocess_cfg[name_there])
        return cls(own, modalities=modalities, clip=clip)


def model_fields(settings: dict[str, Any]) -> dict[str, Any]:
    """The fields of the model that `settings` names or holds."""
    check_options("open_clip", settings, OPTIONS)
    if "model_cfg" in settings:
        return copy.deepcopy(settings["model_cfg"])
    name = settings.get("model", "")
    try:
        fields = open_clip.get_model_config(name)
    except OSError as error:
        raise CheckpointError(
            f"{name!r} holds no readable open_clip_config.json: {error}"
        ) from error
    if fields is None:
        raise ConfigError(
            f"unknown open_clip model {name!r}; {nearest(name, open_clip.list_models())}"
            if name
            else "backbone_config.model is needed for open_clip, such as 'ViT-B-16'."
        )
    return fields


def towers_of(clip: Any) -> tuple[VisionTransformer, TextParts]:
    """The two towers of a model, if they are of the supported kinds; else ConfigError."""
    text = clip if isinstance(clip, open_clip.CLIP) else clip.text
    problems = []
    if not isinstance(clip.visual, VisionTransformer):
        problems.append(f"its image tower is {type(clip.visual).__name__}, not VisionTransformer")
    if text is not clip and not isinstance(text, TextTransformer):
        problems.append(f"its text tower is {type(text).__name__}, not TextTransformer")
    elif text.attn_mask is None or (text is not clip and text.cls_emb is not None):
        problems.append("its text tower is not a plain causal transformer")
    elif text.text_projection is None:
        problems.append("its text tower has no projection")
    for module in clip.modules():
        if isinstance(module, CustomResidualAttentionBlock):
            problems.append("its blocks are custom ones")
            break
    if problems:
        raise ConfigError(
            f"this open_clip model cannot be edited block by block: {', '.join(problems)}; take a "
            "ViT-* model of the CLIP family."
        )
    flat = text is clip  # CLIP keeps the parts of its text tower on itself
    return clip.visual, TextParts(
        token_embedding=text.token_embedding,
        positional_embedding=text.positional_embedding,
        blocks=text.transformer.resblocks,
        ln_final=text.ln_final,
        text_projection=text.text_projection,
        pool_type=text.text_pool_type if flat else text.pool_type,
        eos_id=text.text_eos_id if flat else text.eos_id,
    )


def clip_tokenizer() -> CLIPTokenizer:
    """open_clip's vocabulary in the library's tokenizer, which can be saved with a model.

    The same ids, except that open_clip also repairs broken Unicode and HTML in the text.
    """
    simple = open_clip.SimpleTokenizer()
    start, end = (simple.decoder[i] for i in simple.all_special_ids)
    merges = sorted(simple.bpe_ranks, key=simple.bpe_ranks.__getitem__)
    return CLIPTokenizer(
        vocab=dict(simple.encoder),
        merges=merges,
        unk_token=end,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        padding_side="right",
        model_max_length=simple.context_length,
    )
