"""A run's model without storage: from the same flags through the same code, without weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from launch.assemble import dense_model
from launch.cli import Settings
from launch.model_config import model_config
from launch.own_models import own_model
from mm_moe.backbones import blip2
from mm_moe.backbones.library import first_line, json_fields
from mm_moe.data.schema import DataSource
from mm_moe.errors import CheckpointError, ConfigError
from mm_moe.models.configuration import MultimodalMoEConfig
from mm_moe.models.modeling import MultimodalMoEModel
from mm_moe.moe.layer import moe_layers

# backbones whose shape comes with their weights, as a config of the library
SHAPE_WITH_WEIGHTS = ("clip", "siglip", "blip2", "text_encoder")


def weightless_config(settings: Settings, source: DataSource) -> MultimodalMoEConfig:
    """The configuration that training ends up with, read without any weights.

    Raises:
        CheckpointError: no readable configuration under the name of the weights.
        ConfigError: a model without a backbone.
    """
    if own_model(settings.run.objective) is not None:
        raise ConfigError(
            f"the planner counts models with a backbone, and --objective {settings.run.objective} "
            "trains one of its own kind; a run of a few steps (--max_steps 3 --logging_steps 1) "
            "logs perf/memory_gb and perf/step_time_s."
        )
    config = model_config(settings, source, prompt=settings.prompt.prompt)
    name = settings.model.pretrained
    if not name or name == "builtin" or Path(name).is_file():
        return config
    fields = _own_fields(name)
    if fields is not None:
        config.backbone_config = fields["backbone_config"]
    elif config.backbone in SHAPE_WITH_WEIGHTS:
        config.backbone_config = _library_fields(name, config)
    return config


def _own_fields(name: str) -> dict[str, Any] | None:
    """The configuration of a model of this library, None if the name is something else."""
    try:
        fields, _ = PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError):
        return None
    return fields if fields.get("model_type") == MultimodalMoEConfig.model_type else None


def _library_fields(name: str, config: MultimodalMoEConfig) -> dict[str, Any]:
    """The backbone's settings as its `load` finds them."""
    try:
        found = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no configuration could be read from {name!r} ({first_line(error)}); "
            "give a folder with config.json, or a Hub name."
        ) from error
    if config.backbone == "blip2":
        fields = json_fields(found, keep_kind=blip2.KINDS) | {"freeze_vision": True}
    elif config.backbone == "text_encoder":
        fields = json_fields(found) | {"model_type": found.model_type}
    else:
        return json_fields(found)
    return fields | config.backbone_config  # with the choices that are ours


def meta_model(settings: Settings, config: MultimodalMoEConfig) -> MultimodalMoEModel:
    """The model as training builds it, without storage, with all experts."""
    without = replace(settings, model=replace(settings.model, pretrained=None))
    with torch.device("meta"):
        model = dense_model(without, copy.deepcopy(config))
    assert isinstance(model, MultimodalMoEModel), "members are refused before"
    return model


def shard(model: MultimodalMoEModel, *, ep_size: int) -> MultimodalMoEModel:
    """A copy with the experts of one process, tagged as `make_expert_parallel` does."""
    model = copy.deepcopy(model)
    for layer in moe_layers(model).values():
        layer.experts = layer.experts.slice(0, layer.num_experts // ep_size)
        for parameter in layer.experts.parameters():
            vars(parameter).update(allreduce=False, group_name=f"ep_size_{ep_size}")
    return model
