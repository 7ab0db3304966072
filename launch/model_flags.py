"""The flags of the model that stand for others, settled and checked before anything is written."""

from __future__ import annotations

import argparse
import json

from mm_moe.arguments import parse_json
from mm_moe.errors import ConfigError
from mm_moe.models.adapters import LoraSettings


def settle_model(values: argparse.Namespace, argv: list[str]) -> None:
    """Turn open_clip's `--model NAME` into `--backbone open_clip` with its configuration.

    What a recipe says of another backbone (its configuration, its weights) no longer holds then;
    what is typed by hand must not contradict.

    Raises:
        ConfigError: a model that open_clip does not have, a typed flag that says something else, or
            adapters that cannot be.
    """
    if values.lora_r < 0:
        raise ConfigError(f"--lora_r {values.lora_r} must be at least 0; 0 is none.")
    if values.lora_r:
        LoraSettings(values.lora_r, values.lora_alpha, values.lora_dropout, values.lora_target)
    if values.keep_head and (values.pretrained or "none").lower() == "none":
        raise ConfigError(
            "--keep_head true needs --pretrained FOLDER, the model whose head is to be taken."
        )
    if not values.model:
        return
    from mm_moe.backbones.openclip import model_fields  # needed by this flag alone

    typed = {word.split("=")[0].lstrip("-").replace("-", "_") for word in argv}
    if "backbone" in typed and values.backbone != "open_clip":
        raise ConfigError(
            f"--model {values.model!r} names a model of open_clip, --backbone says "
            f"{values.backbone!r}; drop one."
        )
    options = {}
    if "backbone_config" in typed:
        options = parse_json("backbone_config", values.backbone_config)
    if options.get("model", values.model) != values.model:
        raise ConfigError(
            f"--model {values.model!r} and backbone_config.model {options['model']!r} contradict "
            "each other; drop one."
        )
    model_fields({"model": values.model})
    values.backbone = "open_clip"
    values.backbone_config = json.dumps({**options, "model": values.model})
    if "pretrained" not in typed:
        values.pretrained = None
