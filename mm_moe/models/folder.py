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
from mm_moe.models.own import OwnModel
from mm_moe.registry import MODELS

KnownConfig = MultimodalMoEConfig | ComposedConfig
AnyConfig = KnownConfig | PreTrainedConfig
AnyModel = MultimodalMoEModel | ComposedModel | OwnModel


def is_composed(fields: Mapping[str, Any]) -> bool:
    """Whether the fields of a configuration are those of a model of several members."""
    return fields.get("model_type") == ComposedConfig.model_type


def is_own(fields: Mapping[str, Any]) -> bool:
    """Whether the fields of a configuration are those of a model of its own kind."""
    return fields.get("model_type") in MODELS


def config_of(fields: Mapping[str, Any]) -> AnyConfig:
    """The configuration with these fields; fields that they lack have their defaults."""
    if is_own(fields):
        own: type[OwnModel] = MODELS.resolve(str(fields["model_type"]))
        assert own.config_class is not None
        return own.config_class.from_dict(dict(fields))
    kind = ComposedConfig if is_composed(fields) else MultimodalMoEConfig
    return kind.from_dict(dict(fields))


def new_model(config: AnyConfig) -> AnyModel:
    """A model with new weights."""
    if isinstance(config, ComposedConfig):
        return ComposedModel(config)
    if isinstance(config, MultimodalMoEConfig):
        return MultimodalMoEModel(config)
    own: type[OwnModel] = MODELS.resolve(str(config.model_type))
    return own(config)


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
    known = (MultimodalMoEConfig.model_type, ComposedConfig.model_type, *MODELS)
    if fields.get("model_type") not in known:
        raise CheckpointError(
            f"{str(folder)!r} holds no model of this library (model_type "
            f"{fields.get('model_type')!r}, not {' or '.join(known)}); name a run's final/."
        )
    return fields


def load_model(folder: str | Path) -> MultimodalMoEModel | ComposedModel:
    """The model of a folder, with one backbone or several members.

    Raises:
        CheckpointError: no such model, or weights that are missing or do not fit.
    """
    fields = read_fields(folder)
    if is_own(fields):
        raise CheckpointError(
            f"{str(folder)!r} holds a {fields['model_type']}, which has no backbone and no classes "
            "to score; load it with transformers.AutoModel after `import mm_moe.models`."
        )
    kind = ComposedModel if is_composed(fields) else MultimodalMoEModel
    return kind.from_pretrained(folder)


def load_own(folder: str | Path) -> OwnModel:
    """The model of its own kind of a folder.

    Raises:
        CheckpointError: no such model, or weights that are missing or do not fit.
    """
    fields = read_fields(folder)
    if not is_own(fields):
        raise CheckpointError(
            f"{str(folder)!r} holds a {fields['model_type']}, not {' or '.join(MODELS)}; name "
            "the final/ of such a run."
        )
    own: type[OwnModel] = MODELS.resolve(str(fields["model_type"]))
    return own.from_pretrained(folder)
