"""Models of any kind of this library, by what their `config.json` says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from mm_moe.errors import CheckpointError
from mm_moe.models.composed import ComposedModel
from mm_moe.models.composed_configuration import ComposedConfig
from mm_moe.models.configuration import MultimodalMoEConfig
from mm_moe.models.modeling import MultimodalMoEModel

AnyConfig = MultimodalMoEConfig | ComposedConfig
AnyModel = MultimodalMoEModel | ComposedModel


def is_composed(fields: Mapping[str, Any]) -> bool:
    """Whether the fields of a configuration are those of a model of several members."""
    return fields.get("model_type") == ComposedConfig.model_type


def config_of(fields: Mapping[str, Any]) -> AnyConfig:
    """The configuration with these fields; fields that they lack have their defaults."""
    kind = ComposedConfig if is_composed(fields) else MultimodalMoEConfig
    return kind.from_dict(dict(fields))


def new_model(config: AnyConfig) -> AnyModel:
    """A model with new weights."""
    if isinstance(config, ComposedConfig):
        return ComposedModel(config)
    return MultimodalMoEModel(config)


def read_fields(folder: str | Path) -> dict[str, Any]:
    """The fields of a folder's `config.json`.

    Raises:
        CheckpointError: there is none, or it is of no model of this library.
    """
    try:
        fields, _ = PreTrainedConfig.get_config_dict(str(folder))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{str(folder)!r} holds no model: its config.json cannot be read; name a run's final/."
        ) from error
    known = (MultimodalMoEConfig.model_type, ComposedConfig.model_type)
    if fields.get("model_type") not in known:
        raise CheckpointError(
            f"{str(folder)!r} holds no model of this library (model_type "
            f"{fields.get('model_type')!r}, not {' or '.join(known)}); name a run's final/."
        )
    return fields


def load_model(folder: str | Path) -> AnyModel:
    """The model of a folder, of whichever kind.

    Raises:
        CheckpointError: no model of this library, or weights that are missing or do not fit.
    """
    kind = ComposedModel if is_composed(read_fields(folder)) else MultimodalMoEModel
    return kind.from_pretrained(folder)
