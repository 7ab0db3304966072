"""BLIP-2 as a backbone: a frozen vision transformer, the Q-Former, and one of two text towers.

A classifier of samples that may lack either modality needs a feature of the image alone and one of
the text alone, of one width. BLIP-2 has two such pairs, and `text` chooses:

- "qformer": `Blip2ForImageTextRetrieval`. Texts go through the Q-Former's text side; both features
  are the projections that its contrastive stage trained.
- "language_model": `Blip2ForConditionalGeneration` with an OPT or a T5. The image feature is the
  mean of the queries as the language model would receive them, the text feature OPT's last token or
  the mean of the tokens that leave T5's encoder.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from mm_moe.backbones.base import Backbone, ProcessorNeeds, Tower
from mm_moe.backbones.blip2_t5 import TRAINED_LENGTH, T5TextTower
from mm_moe.backbones.blip2_towers import (
    OptTextTower,
    QFormerImageTower,
    QFormerTextTower,
    VisionImageTower,
)
from mm_moe.backbones.library import (
    check_same_settings,
    json_fields,
    library_config,
    read_library_model,
)
from mm_moe.batch import IMAGE, TEXT
from mm_moe.errors import ConfigError
from mm_moe.registry import nearest

CHOICES = {"text": ("qformer", "language_model"), "blocks": ("qformer", "vision")}
OWN = (*CHOICES, "freeze_vision")
KINDS = ("text_config",)  # whose class hangs on its model_type
MODEL_OF = {"qformer": Blip2ForImageTextRetrieval, "language_model": Blip2ForConditionalGeneration}
LANGUAGE_MODELS = ("opt", "t5")  # model types of text_config
STD = 0.02


class Blip2Backbone(Backbone):
    """Any BLIP-2 with an OPT or a T5 that `transformers` reads, or one of random weights.

    Args:
        settings: "text" (see above; default "qformer"), "blocks" ("qformer" or "vision": where
            prompts and experts act in the image tower; default "qformer"), "freeze_vision" (default
            true for loaded weights, false for random ones), and the fields of Blip2Config.
        modalities: towers to keep, of "image" and "text".
        blip2: a ready model to take apart instead of a new random one.

    Raises:
        ConfigError: settings that are no Blip2Config, an unknown choice, or another language model.

    Random weights differ from the library's in two things that it only fills from checkpoints:
    query tokens are drawn (theirs are zero, so all alike for ever), and so is the vision
    transformer, with a standard deviation of 0.02 (theirs 1e-10).
    """

    supported = (IMAGE, TEXT)

    def __init__(
        self,
        settings: dict[str, Any],
        *,
        modalities: tuple[str, ...] = (IMAGE, TEXT),
        blip2: Any = None,
    ) -> None:
        own, config = split_settings(settings)
        super().__init__({**settings, **own}, modalities=modalities)
        if blip2 is None:
            blip2 = MODEL_OF[own["text"]](config)
            nn.init.normal_(blip2.query_tokens, std=STD)
        lm = own["text"] == "language_model"
        projection = blip2.language_projection if lm else blip2.vision_projection
        towers: dict[str, Tower] = {}
        if IMAGE in self.parts.values():
            image = QFormerImageTower(blip2, projection, freeze_vision=own["freeze_vision"])
            towers[IMAGE] = VisionImageTower(image) if own["blocks"] == "vision" else image
        if TEXT in self.parts.values():
            towers[TEXT] = language_tower(blip2) if lm else QFormerTextTower(blip2)
        self.set_towers(towers)

    @classmethod
    def processor_needs(cls, settings: dict[str, Any]) -> ProcessorNeeds:
        """Sizes from the config; a tokenizer must come with the weights."""
        own, config = split_settings(settings)
        lm = own["text"] == "language_model"
        text = config.text_config if lm else config.qformer_config
        relative = text.model_type == "t5"
        return ProcessorNeeds(
            image_size=config.vision_config.image_size,
            max_text_tokens=TRAINED_LENGTH if relative else text.max_position_embeddings,
            vocab_size=text.vocab_size,
        )

    @classmethod
    def load(
        cls, pretrained: str, *, settings: dict[str, Any], modalities: tuple[str, ...]
    ) -> Blip2Backbone:
        """Read a BLIP-2 checkpoint from a folder or the Hub; its own config replaces `settings`.

        Raises:
            ConfigError: `settings` say something else than the checkpoint.
            CheckpointError: nothing readable under that name, or a checkpoint of the other kind
                (a retrieval model for text "qformer", a generating one for "language_model").
        """
        chosen = {name: value for name, value in settings.items() if name in OWN}
        chosen.setdefault("freeze_vision", True)
        check_choices(chosen)
        text = chosen.get("text", "qformer")
        blip2 = read_library_model(MODEL_OF[text], pretrained, kind=f"BLIP-2 ({text})")
        fields = json_fields(blip2.config, keep_kind=KINDS)
        check_same_settings(settings, fields, pretrained)
        return cls({**fields, **chosen}, modalities=modalities, blip2=blip2)


def language_tower(blip2: Any) -> Tower:
    """The text tower that a BLIP-2's language model gives."""
    model = blip2.language_model
    if model.config.model_type == "t5":
        return T5TextTower(model.encoder)
    return OptTextTower(model.model.decoder)


def check_choices(own: dict[str, Any]) -> None:
    """Raise ConfigError for a choice that does not exist."""
    for name, known in CHOICES.items():
        if own.get(name, known[0]) not in known:
            raise ConfigError(
                f"backbone_config.{name} {own[name]!r} is unknown; "
                f"{nearest(str(own[name]), list(known))}"
            )


def split_settings(settings: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Our own choices, complete, and the library's config."""
    own = {"text": "qformer", "blocks": "qformer", "freeze_vision": False}
    own |= {name: value for name, value in settings.items() if name in OWN}
    check_choices(own)
    fields = {name: value for name, value in settings.items() if name not in OWN}
    known = list(Blip2Config().to_dict())
    for name in fields:
        if name not in known:
            raise ConfigError(f"unknown blip2 option {name!r}; {nearest(name, [*OWN, *known])}")
    fields["vision_config"] = {"initializer_range": STD} | dict(fields.get("vision_config", {}))
    if own["text"] == "qformer":
        fields["qformer_config"] = dict(fields.get("qformer_config", {})) | {
            "use_qformer_text_input": True
        }
    config = library_config(Blip2Config, fields)
    kind = config.text_config.model_type
    if own["text"] == "language_model" and kind not in LANGUAGE_MODELS:
        raise ConfigError(
            f"text_config.model_type {kind!r} is not supported as a text tower; take a BLIP-2 with "
            "an OPT or a T5, or text 'qformer'."
        )
    return own, config
