"""A run's model without storage: from the same flags through the same code, without weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from launch.assemble import dense_model
from launch.cli import Settings
from launch.model_config import model_config
from mm_moe.backbones import blip2
from mm_moe.backbones.library import first_line, json_fields
from mm_moe.data.schema import DataSource
from mm_moe.errors import CheckpointError
from mm_moe.models.configuration import MultimodalMoEConfig
from mm_moe.models.modeling import MultimodalMoEModel
from mm_moe.moe.layer import MoELayer, moe_layers
from mm_moe.moe.placed import PlacedExperts, placed_layers

# backbones whose shape comes with their weights, as a config of the library
SHAPE_WITH_WEIGHTS = ("clip", "siglip", "blip2", "text_encoder")


AnyShard = TypeVar("AnyShard", bound=nn.Module)


def weightless_config(settings: Settings, source: DataSource) -> MultimodalMoEConfig:
    """The configuration that training ends up with, read without any weights.

    Raises:
        CheckpointError: no readable configuration under the name of the weights.
    """
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


def shard(model: AnyShard, *, ep_size: int) -> AnyShard:
    """A copy with the experts of one process, tagged as `make_expert_parallel` does.

    Of experts of unlike sizes it has the process whose experts are largest.
    """
    model = copy.deepcopy(model)
    for placed in placed_layers(model).values():
        _hold(placed, ep_size)
    for layer in moe_layers(model).values():
        layer.experts = layer.experts.slice(0, layer.num_experts // ep_size)
        for parameter in layer.experts.parameters():
            vars(parameter).update(allreduce=False, group_name=f"ep_size_{ep_size}")
    return model


def _hold(layer: PlacedExperts, ep_size: int) -> None:
    """Keep one process' experts, each parameter in the largest shape at its place."""
    shapes = {name: dict(part.named_parameters()) for name, part in layer.experts.items()}
    weights = [sum(p.numel() for p in own.values()) for own in shapes.values()]
    held = held_names(layer.names, weights=weights, ep_size=ep_size)
    per_process = len(held)
    for name in layer.names:
        if name not in held:
            del layer.experts[name]
    for slot, name in enumerate(held):
        rivals = layer.names[slot::per_process]
        for own, parameter in layer.experts[name].named_parameters():
            sizes = [shapes[rival][own].shape for rival in rivals]
            largest = [max(size) for size in zip(*sizes, strict=True)]
            parameter.data = parameter.data.new_empty(largest)
            tags = {"allreduce": False, "group_name": f"ep_size_{ep_size}", "single_expert": True}
            vars(parameter).update(tags)


def held_names(names: Sequence[str], *, weights: Sequence[float], ep_size: int) -> tuple[str, ...]:
    """The experts of the process that has most to hold; all, where one process has all."""
    count = len(names) // ep_size
    first = max(range(0, len(names), count), key=lambda at: sum(weights[at : at + count]))
    return tuple(names[first : first + count])


def hidden_of(layer: MoELayer) -> int:
    """F of a sparse layer."""
    return int(layer.experts.w_out.shape[1])


def host_memory() -> int:
    """Bytes of this host's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
