"""From the flags of a run and what its data are to the configuration of the model."""

from __future__ import annotations

from typing import Any

from launch.check_objective import backbone_fields, logit_fields
from launch.cli import Settings
from launch.interaction_experts import interaction_fields
from mm_moe.arguments import FLAG_OF_SETTING, ModelArguments, parse_json
from mm_moe.data.schema import ONE_VALUE, REGRESSION, DataSource
from mm_moe.errors import ConfigError
from mm_moe.models.configuration import MultimodalMoEConfig
from mm_moe.registry import BACKBONES


def moe_settings(moe: Any) -> dict[str, Any] | None:
    """The sparse layers' settings as a plain dict, from `MoEArguments` or the bare flags.

    `num_experts` is a list where it differs between layers; `expert_settings` reads both forms.
    """
    if not moe.moe_enable:
        return None
    flags = {setting: getattr(moe, flag) for setting, flag in FLAG_OF_SETTING.items()}
    if len(moe.num_experts) == 1:
        flags["num_experts"] = moe.num_experts[0]
    return {**flags, **parse_json("moe_config", moe.moe_config)}


def model_config(settings: Settings, source: DataSource, *, prompt: str) -> MultimodalMoEConfig:
    """The model's configuration; the same settings always give the same one."""
    return MultimodalMoEConfig(**config_fields(settings, source, prompt=prompt))


def config_fields(settings: Settings, source: DataSource, *, prompt: str) -> dict[str, Any]:
    """What `model_config` sets."""
    places = {
        name: value
        for name in ("moe_mode", "moe_every")
        if (value := getattr(settings.moe, name)) is not None
    }
    same_prompt = prompt == settings.prompt.prompt
    return {
        "backbone": settings.model.backbone,
        "backbone_config": backbone_settings(settings, source),
        "modalities": list(source.modalities),
        "moe": moe_settings(settings.moe),
        "moe_layers": settings.moe.moe_layers_idx,
        **places,
        "prompt": prompt,
        "prompt_config": parse_json("prompt_config", settings.prompt.prompt_config)
        if same_prompt
        else {},
        "fill": settings.model.fill,
        "fill_config": parse_json("fill_config", settings.model.fill_config),
        "lora": lora_fields(settings.model),
        "feature_norm": settings.model.feature_norm,
        "pad_text": settings.model.pad_text,
        "upcycle_noise": settings.moe.upcycle_noise,
        "upcycle_drop": settings.moe.upcycle_drop,
        "fusion": settings.model.fusion,
        "fusion_options": parse_json("fusion_config", settings.model.fusion_config),
        "fusion_rank": settings.model.fusion_rank,
        "fusion_size": settings.model.fusion_size,
        "head_hidden_size": settings.model.head_hidden_size,
        "interaction_experts": interaction_fields(settings.moe),
        **label_fields(source),
        **logit_fields(settings),
    }


def backbone_settings(settings: Settings, source: DataSource) -> dict[str, Any]:
    """The backbone's own settings, with the widths of feature sequences from the data.

    Raises:
        ConfigError: sequences or arrays for a backbone that takes none.
    """
    given = parse_json("backbone_config", settings.model.backbone_config)
    given |= backbone_fields(settings)
    backbone_class = BACKBONES.resolve(settings.model.backbone)
    if source.array_shapes and not backbone_class.takes_arrays:
        raise ConfigError(
            f"data set {source.name!r} holds arrays ({', '.join(source.array_shapes)}), which "
            f"backbone {settings.model.backbone!r} does not take; take --backbone small."
        )
    if not (source.sequences or source.array_shapes):
        return given
    if source.sequences and not backbone_class.takes_sequences:
        raise ConfigError(
            f"data set {source.name!r} holds feature sequences ({', '.join(source.sequences)}), "
            f"which backbone {settings.model.backbone!r} does not take; take --backbone sequences."
        )
    found: dict[str, Any] = {}
    if source.sequences:
        found["sequences"] = {name: dict(about) for name, about in source.sequences.items()}
    if source.array_shapes:
        found["arrays"] = {name: dict(about) for name, about in source.array_shapes.items()}
    return {**found, **given}


def label_fields(source: DataSource) -> dict[str, Any]:
    """The configuration fields of the head: classes, one number, or no head at all."""
    if source.problem_type == "none":
        return {"num_labels": 0}
    if source.problem_type in ONE_VALUE:  # a risk is a number: transformers knows no survival
        return {"num_labels": 1, "problem_type": REGRESSION}
    return {"label_names": list(source.label_names), "problem_type": source.problem_type}


def lora_fields(model: ModelArguments) -> dict[str, Any] | None:
    """The adapters that the flags ask for."""
    if model.lora_r == 0:
        return None
    return {
        "r": model.lora_r,
        "alpha": model.lora_alpha,
        "dropout": model.lora_dropout,
        "target": model.lora_target,
    }
