"""BLIP-2 as a backbone: a frozen vision transformer, the Q-Former, and one of two text towers.

A classifier of samples that may lack either modality needs a feature of the image alone and one of
the text alone, of one width. BLIP-2 has two such pairs, and `text` chooses:

- "qformer": `Blip2ForImageTextRetrieval`. Texts go through the Q-Former's text side; both features
  are the projections that its contrastive stage trained.
- "language_model": `Blip2ForConditionalGeneration` with an OPT or a T5. The image feature is the
  mean of the queries as the language model would receive them, the text feature OPT's last token or
  the mean of the tokens that leave T5's encoder.

With `stage_one` the Q-Former is that of BLIP-2's first stage (`blip2_stage1`): queries and texts
share the self-attention, and the image feature is all projected queries. `adapted` turns it into
the two towers of "qformer", to be trained on labels.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from mm_moe.backbones.base import Backbone, ProcessorNeeds, Tower
from mm_moe.backbones.blip2_stage1 import SharedTextTower, StageOneHeads, StageOnePasses
from mm_moe.backbones.blip2_t5 import TRAINED_LENGTH, T5TextTower
from mm_moe.backbones.blip2_towers import (
    OptTextTower,
    QFormerImageTower,
    QFormerTextTower,
    VisionImageTower,
)
from mm_moe.backbones.blip2_vision import SMALL_CLIP, small_clip_vision, stand_in_config
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
STAGE_ONE = ("stage_one", "start_token")
OWN = (*CHOICES, "freeze_vision", "vision_from", *STAGE_ONE)
KINDS = ("text_config",)  # whose class hangs on its model_type
MODEL_OF = {"qformer": Blip2ForImageTextRetrieval, "language_model": Blip2ForConditionalGeneration}
LANGUAGE_MODELS = ("opt", "t5")  # model types of text_config
STD = 0.02


class Blip2Backbone(Backbone):
    """Any BLIP-2 with an OPT or a T5 that `transformers` reads, or one of random weights.

    Args:
        settings: "text" (see above; default "qformer"), "blocks" ("qformer" or "vision": where
            prompts and experts act in the image tower; default "qformer"), "freeze_vision" (default
            true for loaded weights, false for random ones), "vision_from" ("small_clip": its image
            tower in the vision transformer's place), "stage_one" (default false),
            "start_token" (with stage_one: the token that asks for a text; default the last of the
            vocabulary, which is the [DEC] of published weights), and the fields of Blip2Config.
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
        super().__init__({**settings, **kept_choices(own)}, modalities=modalities)
        if blip2 is None:
            blip2 = MODEL_OF[own["text"]](config)
            nn.init.normal_(blip2.query_tokens, std=STD)
        if own.get("vision_from"):
            blip2.vision_model = small_clip_vision()
        lm = own["text"] == "language_model"
        projection = blip2.language_projection if lm else blip2.vision_projection
        self.heads: StageOneHeads | None = None
        if own["stage_one"]:
            self._build_stage_one(blip2, own["freeze_vision"])
            return
        towers: dict[str, Tower] = {}
        if IMAGE in self.parts.values():
            image = QFormerImageTower(blip2, projection, freeze_vision=own["freeze_vision"])
            towers[IMAGE] = VisionImageTower(image) if own["blocks"] == "vision" else image
        if TEXT in self.parts.values():
            towers[TEXT] = language_tower(blip2) if lm else QFormerTextTower(blip2)
        self.set_towers(towers)

    def _build_stage_one(self, blip2: Any, freeze_vision: bool) -> None:
        if self.modalities != (IMAGE, TEXT):
            raise ConfigError(
                f"backbone_config.stage_one is for image and text, the data have "
                f"{', '.join(self.modalities)}."
            )
        image = QFormerImageTower(
            blip2, blip2.vision_projection, freeze_vision=freeze_vision, every_query=True
        )
        self.set_towers({IMAGE: image, TEXT: SharedTextTower(blip2, image)})
        self.heads = StageOneHeads(blip2)

    def feature_width(self, modality: str) -> int:
        """Width of one modality's feature; of all queries after the first stage."""
        return self.towers[modality].out_width  # type: ignore[return-value]

    @property
    def start_token(self) -> int:
        """The token that asks for a text."""
        return int(self.settings["start_token"])

    def stage_one(self) -> StageOnePasses:
        """The passes of one training step of the first stage.

        Raises:
            ConfigError: the Q-Former is not that of the first stage.
        """
        if self.heads is None:
            raise ConfigError(
                "BLIP-2's first stage needs its Q-Former: --backbone_config "
                "'{\"stage_one\": true}'."
            )
        image: Any = self.towers[IMAGE]
        text: Any = self.towers[TEXT]
        return StageOnePasses(image, text, self.heads, recompute_every=self.recompute_every)

    def adapted(self, settings: dict[str, Any]) -> Blip2Backbone:
        """After the first stage: the towers of "qformer" with copies of what they shared.

        Its heads are dropped. Experts are handed over, not copied.

        Raises:
            ConfigError: the first stage is asked for, and this is not its Q-Former.
        """
        wanted = bool(settings.get("stage_one", False))
        if wanted == (self.heads is not None):
            return self
        if wanted:
            raise ConfigError(
                "backbone_config.stage_one (true) differs from the pretrained weights, which are "
                "not of BLIP-2's first stage; start from none, or from a Hub name such as "
                "Salesforce/blip2-itm-vit-g."
            )
        plain = {name: value for name, value in self.settings.items() if name not in STAGE_ONE}
        new = Blip2Backbone(plain, modalities=self.modalities)
        for name in self.modalities:
            ours: Any = self.towers[name]
            theirs: Any = new.towers[name]
            for (parent, attribute), (old, _) in zip(
                theirs.feed_forwards(), ours.feed_forwards(), strict=True
            ):
                setattr(parent, attribute, getattr(old, attribute))
        weights = self.state_dict()
        shared = f"towers.{TEXT}.", f"towers.{IMAGE}."
        new.load_state_dict(
            {
                name: weights[name if name in weights else name.replace(*shared)]
                for name in new.state_dict()
            }
        )
        return new

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

        "builtin" is the small CLIP's image tower, frozen, and a new Q-Former of `settings`.

        Raises:
            ConfigError: `settings` say something else than the checkpoint.
            CheckpointError: nothing readable under that name, or a checkpoint of the other kind
                (a retrieval model for text "qformer", a generating one for "language_model").
        """
        chosen = {name: value for name, value in settings.items() if name in OWN}
        chosen.setdefault("freeze_vision", True)
        check_choices(chosen)
        if pretrained == "builtin":
            new = cls({**settings, **chosen, "vision_from": SMALL_CLIP}, modalities=modalities)
            if IMAGE in new.towers:
                vision: Any = new.towers[IMAGE].vision
                vision.load_state_dict(small_clip_vision(trained=True).state_dict())
            return new
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


def kept_choices(own: dict[str, Any]) -> dict[str, Any]:
    """Our own choices as checkpoints keep them; without the first stage, as before there was it."""
    return {name: value for name, value in own.items() if own["stage_one"] or name not in STAGE_ONE}


def check_choices(own: dict[str, Any]) -> None:
    """Raise ConfigError for a choice that does not exist."""
    if own.get("vision_from", SMALL_CLIP) != SMALL_CLIP:
        raise ConfigError(
            f"backbone_config.vision_from {own['vision_from']!r} is unknown; known: {SMALL_CLIP}."
        )
    if "vision_from" in own and own.get("blocks") == "vision":
        raise ConfigError(
            "backbone_config.blocks 'vision' is for BLIP-2's own vision transformer; leave it or "
            "vision_from out."
        )
    for name, known in CHOICES.items():
        if own.get(name, known[0]) not in known:
            raise ConfigError(
                f"backbone_config.{name} {own[name]!r} is unknown; "
                f"{nearest(str(own[name]), list(known))}"
            )


def split_settings(settings: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Our own choices, complete, and the library's config."""
    own: dict[str, Any] = {"text": "qformer", "blocks": "qformer", "freeze_vision": False}
    own |= {"stage_one": False}
    own |= {name: value for name, value in settings.items() if name in OWN}
    check_choices(own)
    fields = {name: value for name, value in settings.items() if name not in OWN}
    known = list(Blip2Config().to_dict())
    for name in fields:
        if name not in known:
            raise ConfigError(f"unknown blip2 option {name!r}; {nearest(name, [*OWN, *known])}")
    fields["vision_config"] = {"initializer_range": STD} | dict(fields.get("vision_config", {}))
    if "vision_from" in own:
        fields["vision_config"] |= stand_in_config()
    if own["text"] == "qformer":
        fields["qformer_config"] = dict(fields.get("qformer_config", {})) | {
            "use_qformer_text_input": True
        }
    config = library_config(Blip2Config, fields)
    if own["stage_one"]:
        settle_stage_one(own, config.qformer_config.vocab_size)
    elif "start_token" in own:
        raise ConfigError("backbone_config.start_token is for stage_one; leave it out.")
    kind = config.text_config.model_type
    if own["text"] == "language_model" and kind not in LANGUAGE_MODELS:
        raise ConfigError(
            f"text_config.model_type {kind!r} is not supported as a text tower; take a BLIP-2 with "
            "an OPT or a T5, or text 'qformer'."
        )
    return own, config


def settle_stage_one(own: dict[str, Any], vocab_size: int) -> None:
    """Check the choices that the first stage leaves, and fill in its start token.

    Raises:
        ConfigError: a tower that it does not have, or a start token outside the vocabulary.
    """
    for name in CHOICES:
        if own[name] != "qformer":
            raise ConfigError(
                f"backbone_config.{name} {own[name]!r} does not go with stage_one, which trains "
                "the Q-Former; leave it out."
            )
    start = own.setdefault("start_token", vocab_size - 1)
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start < vocab_size:
        raise ConfigError(
            f"backbone_config.start_token ({start!r}) must be a token id from 0 to "
            f"{vocab_size - 1}; leave it out for the last."
        )
