"""A new model from a configuration and, if wanted, from weights that exist already."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedConfig

from mm_moe.errors import CheckpointError, ConfigError
from mm_moe.models.configuration import MultimodalMoEConfig
from mm_moe.models.modeling import MultimodalMoEModel
from mm_moe.registry import BACKBONES


def build_model(
    config: MultimodalMoEConfig, *, pretrained: str | None = None
) -> MultimodalMoEModel:
    """A new model; dense weights are loaded first and then copied into the experts.

    `config.backbone_config` becomes complete, so that a saved model rebuilds from its own folder.

    Args:
        config: what to build.
        pretrained: None for random weights, or what the backbone can load: "builtin" (weights that
            come with the package), a file, a folder, a Hub name. A folder of a model of this
            library gives its backbone, with its experts if it has any, and adapters merged.

    Raises:
        ConfigError: settings that cannot work.
        CheckpointError: no such weights, or weights of another model.
    """
    modalities = tuple(config.modalities)
    backbone_class = BACKBONES.resolve(config.backbone)
    if pretrained is None:
        backbone = backbone_class(config.backbone_config, modalities=modalities)
    elif _is_own(pretrained):
        return _take_over(config, pretrained)
    else:
        backbone = backbone_class.load(
            pretrained, settings=config.backbone_config, modalities=modalities
        )
    config.backbone_config = backbone.settings
    return MultimodalMoEModel(config, backbone=backbone)


def _is_own(pretrained: str) -> bool:
    """Whether a folder or Hub name holds a model of this library."""
    path = Path(pretrained)
    if path.is_file() or not (path.is_dir() or pretrained.count("/") == 1):
        return False  # a file, a tag, "builtin"
    try:
        fields, _ = PreTrainedConfig.get_config_dict(pretrained)
    except (OSError, ValueError):
        return False  # the backbone says what it looked for
    return fields.get("model_type") == MultimodalMoEConfig.model_type


def _take_over(config: MultimodalMoEConfig, pretrained: str) -> MultimodalMoEModel:
    """A new model of `config` on the backbone of an existing one."""
    source = MultimodalMoEModel.from_pretrained(pretrained)
    source.merge_lora()
    theirs = source.config
    if theirs.backbone != config.backbone or list(theirs.modalities) != list(config.modalities):
        raise ConfigError(
            f"{pretrained!r} has backbone {theirs.backbone!r} with {', '.join(theirs.modalities)}, "
            f"asked for is {config.backbone!r} with {', '.join(config.modalities)}."
        )
    backbone = source.backbone.adapted(config.backbone_config)
    for key, value in config.backbone_config.items():
        if backbone.settings.get(key, value) != value:
            raise ConfigError(
                f"backbone_config.{key} ({value}) differs from {pretrained!r} "
                f"({backbone.settings[key]}); leave it out."
            )
    config.backbone_config = backbone.settings
    if theirs.moe is None:
        return MultimodalMoEModel(config, backbone=backbone)
    lora, config.lora = config.lora, None  # adapters rename what they stand beside
    model = MultimodalMoEModel(config)
    ours, weights = model.backbone.state_dict(), backbone.state_dict()
    for name in {**ours, **weights}:
        if name not in ours or name not in weights or ours[name].shape != weights[name].shape:
            raise CheckpointError(
                f"the sparse layers of {pretrained!r} ({theirs.moe['num_experts']} experts, "
                f"{_places(theirs)}) are not those asked for (moe {config.moe}, "
                f"{_places(config)}): {name!r} differs. Ask for the same ones."
            )
    model.backbone.load_state_dict(weights)
    model.anchor_prompt()
    if lora is None:
        return model
    config.lora = lora
    return MultimodalMoEModel(config, backbone=model.backbone)


def _places(config: MultimodalMoEConfig) -> str:
    """Where the sparse layers are, in words."""
    if config.moe_layers is not None:
        return f"moe_layers {config.moe_layers}"
    every = f", every {config.moe_every}" if config.moe_mode == "sparse" else ""
    return f"moe_mode {config.moe_mode}{every}"
