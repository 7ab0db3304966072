"""From raw images and texts to a backbone's input tensors, in the library's own file formats.

Axes: N rows, L tokens, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPProcessor,
    PreTrainedTokenizerBase,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from mm_moe.backbones.base import ProcessorNeeds
from mm_moe.backbones.clip_small import SMALL_CLIP_FOLDER
from mm_moe.batch import IMAGE, TEXT, base_modality
from mm_moe.errors import ConfigError
from mm_moe.models.composed_configuration import ComposedConfig
from mm_moe.models.configuration import MultimodalMoEConfig
from mm_moe.models.sequence_processing import ArrayProcessor, SequenceProcessor
from mm_moe.registry import BACKBONES

Processor = Callable[[list[Any]], dict[str, Tensor]]


class ImageProcessor:
    """List of PIL images -> {"pixel_values": float32 (N, 3, H, W)}.

    The numbers are those of the library's processor. Images that already have the final size, which
    a small run meets in every step, skip its general path (about ten times faster).

    Args:
        library: an image processor of any of its models; holds the settings and does the general
            case.
    """

    def __init__(self, library: Any) -> None:
        self.library = library
        size = dict(library.size)
        cropped = bool(getattr(library, "do_center_crop", False))  # SigLIP's has no such setting
        final = dict(library.crop_size) if cropped else size
        side = final.get("shortest_edge", 0)
        self.height, self.width = final.get("height", side), final.get("width", side)
        square = self.height == self.width
        # an image of the final size leaves the resizing as it came in
        kept = {"height": self.height, "width": self.width}, {"shortest_edge": self.height}
        plain = library.do_rescale and library.do_normalize
        self.has_fast_path = plain and square and (not library.do_resize or size in kept)
        mean_C, std_C = torch.tensor(library.image_mean), torch.tensor(library.image_std)
        self.scale_C11 = (library.rescale_factor / std_C).view(3, 1, 1)
        self.shift_C11 = (-mean_C / std_C).view(3, 1, 1)

    def __call__(self, images: list[Image]) -> dict[str, Tensor]:
        """Resize, crop, scale and normalise."""
        final = all(image.size == (self.width, self.height) for image in images)
        if not (self.has_fast_path and final):
            batch = self.library(images=images, return_tensors="pt")
            return {"pixel_values": batch["pixel_values"]}
        pixels_NCHW = torch.empty(len(images), 3, images[0].height, images[0].width)
        # One picture after the other: it stays in the cache for the three passes over it.
        for image, pixels_CHW in zip(images, pixels_NCHW, strict=True):
            rgb = image if image.mode == "RGB" else image.convert("RGB")
            pixels_HWC = torch.from_numpy(np.array(rgb))
            pixels_CHW.copy_(pixels_HWC.permute(2, 0, 1))
            pixels_CHW.mul_(self.scale_C11).add_(self.shift_C11)
        return {"pixel_values": pixels_NCHW}


class TextProcessor:
    """List of str -> {"input_ids", "attention_mask": int64 (N, L)}, padded to the longest row.

    Args:
        tokenizer: the library's tokenizer.
        max_tokens: longer texts are cut, keeping their end mark.
        fill: token id with which every row is filled up to `max_tokens`; None: no row is.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, fill: int | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.max_tokens, self.fill = max_tokens, fill

    def __call__(self, texts: list[str]) -> dict[str, Tensor]:
        """Tokenize."""
        rows = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            padding_side="right",  # the text tower's causal order hides only what stands behind
            return_tensors="pt",
            return_attention_mask=True,
        )
        ids_NL, mask_NL = rows["input_ids"], rows["attention_mask"]
        if self.fill is not None:
            behind = (0, self.max_tokens - ids_NL.shape[1])
            ids_NL = F.pad(ids_NL.masked_fill(mask_NL == 0, self.fill), behind, value=self.fill)
            mask_NL = F.pad(mask_NL, behind)
        return {"input_ids": ids_NL, "attention_mask": mask_NL}


def processors_for(
    config: MultimodalMoEConfig | ComposedConfig, *, source: str | None = None
) -> dict[str, Processor]:
    """One processor per modality of a model.

    Files are looked for in `source` ("builtin": small_clip's tokenizer), then where the config was
    loaded from, then with the backbone. Without image settings there, images are resized to the
    model's size and normalised with the backbone's constants, or CLIP's.

    Args:
        config: of the model.
        source: a folder or Hub name with processor files, such as that of the pretrained weights.

    Raises:
        ConfigError: no tokenizer is found, one with more tokens than the model has room for, or a
            `pad_text` that is no token.
    """
    if isinstance(config, ComposedConfig):
        return _processors_of_members(config, source)
    needs = BACKBONES.resolve(config.backbone).processor_needs(config.backbone_config)
    places = [place for place in (source, config.name_or_path, needs.source) if place]
    makers: dict[str, Callable[[list[str], ProcessorNeeds], Processor]] = {
        IMAGE: _image_processor,
        TEXT: partial(_text_processor, fill=config.pad_text),
    }
    found: dict[str, Processor] = {}
    for name in config.modalities:
        if name in needs.sequences:
            found[name] = SequenceProcessor(needs.sequences[name])
        elif name in needs.arrays:
            found[name] = ArrayProcessor(needs.arrays[name])
        else:
            found[name] = makers[base_modality(name)](places, needs)
    return found


def _processors_of_members(config: ComposedConfig, source: str | None) -> dict[str, Processor]:
    """Those of the first member that has a modality; of one that no member has, nothing is kept."""
    found: dict[str, Processor] = {}
    for name in config.members:
        own = config.member_config(name)
        if set(own.modalities) <= set(found):
            continue
        own.name_or_path = own.name_or_path or config.name_or_path
        found = {**processors_for(own, source=source), **found}
    return {**dict.fromkeys(config.modalities, _count_rows), **found}


def _count_rows(rows: list[Any]) -> dict[str, Tensor]:
    """Rows (N, 0) of a modality that nobody reads."""
    return {"rows": torch.zeros(len(rows), 0)}


def check_same_inputs(config: ComposedConfig) -> None:
    """Refuse members that want one modality in different forms: they share its payload.

    Raises:
        ConfigError: names the modality and the members.
    """
    seen: dict[str, tuple[str, Any]] = {}
    for name in config.members:
        own = config.member_config(name)
        needs = BACKBONES.resolve(own.backbone).processor_needs(own.backbone_config)
        for modality in own.modalities:
            form: Any = needs.sequences.get(modality) or needs.arrays.get(modality)
            if form is None and base_modality(modality) == IMAGE:
                form = (needs.image_size, needs.image_mean, needs.image_std)
            elif form is None:
                form = (needs.max_text_tokens, needs.vocab_size, own.pad_text)
            first, theirs = seen.setdefault(modality, (name, form))
            if theirs != form:
                raise ConfigError(
                    f"members {first!r} and {name!r} share the payload of {modality!r} and want "
                    f"it differently ({theirs} and {form}); give them backbones with the same "
                    "input."
                )


def save_processors(processors: dict[str, Processor], folder: Path) -> None:
    """Write the library's own files, so that AutoProcessor or `processors_for` reads them back."""
    kinds = {base_modality(name): processor for name, processor in processors.items()}
    image, text = kinds.get(IMAGE), kinds.get(TEXT)
    if (
        isinstance(image, ImageProcessor)
        and isinstance(text, TextProcessor)
        and isinstance(image.library, CLIPImageProcessor)
    ):
        CLIPProcessor(image.library, text.tokenizer).save_pretrained(folder)
        return
    if isinstance(image, ImageProcessor):
        image.library.save_pretrained(folder)
    if isinstance(text, TextProcessor):
        text.tokenizer.save_pretrained(folder)


def _has(place: str, *files: str) -> bool:
    """Whether a place may hold one of the files: a folder is looked into, a Hub name is trusted."""
    folder = Path(place)
    if folder.is_dir():
        return any((folder / name).is_file() for name in files)
    return not folder.exists() and place != "builtin"


def _image_processor(places: list[str], needs: ProcessorNeeds) -> ImageProcessor:
    for place in places:
        if _has(place, "preprocessor_config.json", "processor_config.json"):
            try:
                return ImageProcessor(AutoImageProcessor.from_pretrained(place))
            except (OSError, ValueError):
                continue  # a Hub name without image settings
    return default_image_processor(needs)


def default_image_processor(needs: ProcessorNeeds) -> ImageProcessor:
    """Images at a model's size, normalised with its backbone's constants, or CLIP's."""
    side = needs.image_size
    library = CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=needs.image_mean or OPENAI_CLIP_MEAN,
        image_std=needs.image_std or OPENAI_CLIP_STD,
    )
    return ImageProcessor(library)


def _text_processor(places: list[str], needs: ProcessorNeeds, *, fill: int | None) -> TextProcessor:
    for place in places:
        place = str(SMALL_CLIP_FOLDER) if place == "builtin" else place
        if _has(place, "tokenizer_config.json", "tokenizer.json", "vocab.json"):
            try:
                tokenizer = AutoTokenizer.from_pretrained(place)
            except (OSError, ValueError):
                continue  # a Hub name without a tokenizer
            return _fitting(tokenizer, place, needs, fill=fill)
    if needs.tokenizer is not None:
        return _fitting(needs.tokenizer(), "the backbone", needs, fill=fill)
    looked = ", ".join(map(repr, places)) or "nowhere, as no place was given"
    raise ConfigError(
        f"no tokenizer found (looked in: {looked}); give a folder or Hub name that has one, with "
        "--tokenizer (builtin: small_clip's) or --pretrained."
    )


def _fitting(
    tokenizer: Any, place: str, needs: ProcessorNeeds, *, fill: int | None
) -> TextProcessor:
    if len(tokenizer) > needs.vocab_size:
        raise ConfigError(
            f"the tokenizer of {place!r} has {len(tokenizer)} tokens, the text tower room for "
            f"{needs.vocab_size}; give the tokenizer that the model was made with."
        )
    if fill is not None and not 0 <= fill < needs.vocab_size:
        raise ConfigError(
            f"pad_text ({fill}) must be a token id between 0 and {needs.vocab_size - 1}; leave it "
            "out to pad to the longest text of a batch."
        )
    return TextProcessor(tokenizer, max_tokens=needs.max_text_tokens, fill=fill)
