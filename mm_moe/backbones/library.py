"""Configurations and checkpoints of `transformers`' models, with errors a user can act on."""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from mm_moe.errors import CheckpointError, ConfigError

# What a config also holds that depends on the library's version or on where it was read from.
NOT_SETTINGS = ("transformers_version", "architectures", "dtype", "_name_or_path")


def library_config(config_class: Any, settings: dict[str, Any]) -> Any:
    """A config from a dict of its fields.

    Raises:
        ConfigError: fields of a wrong type, or values that the library refuses.
    """
    try:
        return config_class(**settings)
    except (TypeError, ValueError, AttributeError, KeyError, StrictDataclassError) as error:
        raise ConfigError(
            f"backbone_config is not a {config_class.__name__}: {first_line(error)}"
        ) from error


def read_library_model(
    model_class: Any, pretrained: str, *, kind: str, add_pooling_layer: bool | None = None
) -> Any:
    """A model in float32 from a folder or the Hub, without any code from there.

    Args:
        model_class: the library's class.
        pretrained: a folder or a Hub name.
        kind: what it is, for messages.
        add_pooling_layer: for classes that have such an option.

    Raises:
        CheckpointError: nothing readable under that name, or a checkpoint that lacks weights.
    """
    options = {} if add_pooling_layer is None else {"add_pooling_layer": add_pooling_layer}
    try:
        model, info = model_class.from_pretrained(
            pretrained,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
            **options,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"no {kind} checkpoint could be read from {pretrained!r} ({first_line(error)}); "
            "give a folder with config.json and model.safetensors, or a Hub name."
        ) from error
    if lost := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{pretrained!r} is no complete {kind} checkpoint: {len(lost)} tensors are missing, "
            f"the first is {lost[0]!r}."
        )
    return model


def check_same_settings(settings: dict[str, Any], own: dict[str, Any], pretrained: str) -> None:
    """Raise ConfigError if `settings` contradict those that came with the weights."""
    for key, value in settings.items():
        if key in own and own[key] != value:
            raise ConfigError(
                f"backbone_config.{key} differs from the checkpoint {pretrained!r}; leave "
                "backbone_config empty when loading pretrained weights."
            )


def json_fields(config: PreTrainedConfig, *, keep_kind: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of a config that rebuild it, without what depends on the library's version.

    Args:
        config: of any model.
        keep_kind: nested configs whose `model_type` decides their class, and is kept.
    """
    fields = config.to_diff_dict()
    parts = {name: part for name, part in fields.items() if isinstance(part, dict)}
    for name, part in {"": fields, **parts}.items():
        for key in NOT_SETTINGS:
            part.pop(key, None)
        if name not in keep_kind:
            part.pop("model_type", None)
    return fields


def first_line(error: Exception) -> str:
    """The first line of an error's text that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
