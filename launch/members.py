"""Runs of several members: their configuration from flags, and members that were trained before."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from transformers import set_seed

from launch.cli import Settings
from launch.model_config import config_fields, label_fields
from mm_moe.arguments import ModelArguments, parse_json
from mm_moe.backbones.base import check_options
from mm_moe.data.schema import DataSource
from mm_moe.errors import CheckpointError, ConfigError
from mm_moe.models.building import build_model
from mm_moe.models.combine import MIXTURE, check_combine
from mm_moe.models.composed import ComposedModel
from mm_moe.models.composed_configuration import GATE, JOIN, ComposedConfig, modalities_of
from mm_moe.models.configuration import MultimodalMoEConfig
from mm_moe.models.folder import is_composed, load_model, read_fields
from mm_moe.models.modeling import MultimodalMoEModel
from mm_moe.models.processing import check_same_inputs

OPTIONS = [  # of one member, by --members_config
    *("backbone", "backbone_config", "pretrained", "moe", "moe_layers", "moe_mode", "moe_every"),
    *("prompt", "prompt_config", "lora", "upcycle_noise", "upcycle_drop", "feature_norm"),
    *("fusion", "fusion_options", "fusion_rank", "fusion_size", "head_hidden_size"),
]
FROM_FLAGS = {  # what a member that lacks the first takes from the flags
    "moe": ("moe", "moe_layers", "moe_mode", "moe_every", "upcycle_noise", "upcycle_drop"),
    "lora": ("lora",),
}


def check_members(values: argparse.Namespace, source: DataSource) -> None:
    """Refuse flags of members that cannot work, before anything is written.

    Raises:
        ConfigError: names the flag, the member and the rule.
        CheckpointError: no model to start a member from.
    """
    only = ("init_members", "freeze_members", "members_config")
    if not values.experts_over:
        given = [flag for flag in only if getattr(values, flag)]
        if values.combine != "product":
            given.append("combine")
        if given:
            raise ConfigError(
                f"--{given[0]} is for models of several members; name them, such as "
                f"--experts_over {' '.join(source.modalities)} {JOIN.join(source.modalities)}."
            )
        return
    if source.problem_type == "none":
        raise ConfigError(
            f"--experts_over combines predictions, and data set {source.name!r} has no labels."
        )
    if values.interaction_experts:
        raise ConfigError(
            "--interaction_experts and --experts_over are two ways to combine; take one of them."
        )
    if values.keep_head:
        raise ConfigError("--keep_head is for one model; give members their runs: --init_members.")
    parts: Any = {field.name: values for field in dataclasses.fields(Settings)}
    settings = Settings(**parts)
    check_same_inputs(composed_config(settings, source, prompt=values.prompt))


def composed_config(settings: Settings, source: DataSource, *, prompt: str) -> ComposedConfig:
    """The configuration of a run with `--experts_over`; the same settings give the same one.

    Raises:
        ConfigError: a name, an option or a number that cannot work.
        CheckpointError: a member to start from that is not there.
    """
    flags = settings.model
    check_combine(flags.combine, source.problem_type)
    names = member_names(flags, source)
    all_names = [*names, GATE] if flags.combine == MIXTURE else names
    options = parse_json("members_config", flags.members_config)
    check_options("--members_config member", options, all_names)
    runs = init_runs(flags, names, options)
    members = {}
    for name in all_names:
        fields = config_fields(settings, source, prompt=prompt)
        own = options.get(name, {})
        check_options(f"--members_config {name}", own, OPTIONS)
        over = source.modalities if name == GATE else modalities_of(name, source.modalities)
        fields |= {"modalities": list(over), **_merged(fields, own)}
        if name == GATE:
            fields = {key: value for key, value in fields.items() if key != "label_names"}
            fields |= {"num_labels": len(names), "problem_type": None}
        members[name] = MultimodalMoEConfig(**fields).to_dict()
        if name in runs:
            members[name] = _of_run(runs[name], name, members[name])
    return ComposedConfig(
        modalities=list(source.modalities),
        members=members,
        combine=flags.combine,
        frozen=list(flags.freeze_members or []),
        **label_fields(source),
    )


def composed_model(settings: Settings, config: ComposedConfig) -> ComposedModel:
    """A single-process model: members of earlier runs with their weights, the others new."""
    set_seed(settings.training.seed)
    options = parse_json("members_config", settings.model.members_config)
    runs = init_runs(settings.model, list(config.experts), options)
    built = {}
    for name in config.members:
        own = config.member_config(name)
        if name in runs:
            built[name] = trained_member(runs[name], name, own)
            continue
        pretrained = options.get(name, {}).get("pretrained", settings.model.pretrained)
        built[name] = build_model(own, pretrained=pretrained)
    return ComposedModel(config, members=built)


def member_names(flags: ModelArguments, source: DataSource) -> list[str]:
    """The members that `--experts_over` names, with their modalities in the data's order.

    Raises:
        ConfigError: a modality that the data do not have, or a member twice.
    """
    wanted = flags.experts_over or []
    names = [JOIN.join(modalities_of(name, source.modalities)) for name in wanted]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--experts_over names {name!r} twice; name each member once.")
    return names


def init_runs(flags: ModelArguments, names: list[str], options: dict[str, Any]) -> dict[str, Path]:
    """Member -> the model folder that `--init_members` starts it from.

    Raises:
        ConfigError: not NAME=RUN, an unknown member, or options for a member that comes as it is.
        CheckpointError: no model there.
    """
    runs: dict[str, Path] = {}
    for word in flags.init_members or []:
        name, _, place = word.partition("=")
        if name not in names or not place:
            raise ConfigError(
                f"--init_members {word!r} must be MEMBER=RUN, with a member of "
                f"{', '.join(names)} and the folder of its run."
            )
        if name in options:
            raise ConfigError(
                f"--members_config {name!r} sets options of a member that --init_members takes as "
                f"it was trained ({place}); leave one of them out."
            )
        folder = Path(place)
        runs[name] = folder / "final" if (folder / "final").is_dir() else folder
        if not runs[name].is_dir():
            raise CheckpointError(f"--init_members {word!r}: there is no folder {place!r}.")
    return runs


def trained_member(folder: Path, name: str, config: MultimodalMoEConfig) -> MultimodalMoEModel:
    """A member of an earlier run as a model of `config`, which may add experts or adapters.

    Raises:
        CheckpointError: no such model or member.
    """
    source = load_model(folder)
    found = source.member(name) if isinstance(source, ComposedModel) else source
    theirs = found.config
    if all(config.to_dict()[key] == theirs.to_dict()[key] for key in FROM_FLAGS):
        return found
    model = MultimodalMoEModel(config, backbone=found.backbone)
    rest = {k: v for k, v in found.state_dict().items() if not k.startswith("backbone.")}
    model.load_state_dict(rest, strict=False)  # head and prompt, which are of the same shapes
    return model


def _merged(fields: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A member's options; of the backbone's settings, those of the data stay."""
    found = {key: value for key, value in own.items() if key != "pretrained"}
    if "backbone_config" in found:
        found["backbone_config"] = {**fields["backbone_config"], **found["backbone_config"]}
    return found


def _of_run(folder: Path, name: str, wanted: dict[str, Any]) -> dict[str, Any]:
    """The fields of a member of an earlier run, with the flags' experts if it has none."""
    fields = read_fields(folder)
    if is_composed(fields):
        if name not in fields["members"]:
            raise CheckpointError(
                f"--init_members {name}={folder}: that model has the members "
                f"{', '.join(fields['members'])}."
            )
        fields = fields["members"][name]
    found = MultimodalMoEConfig.from_dict(fields).to_dict()
    for key in ("modalities", "id2label"):
        if found[key] != wanted[key]:
            raise ConfigError(
                f"--init_members {name}={folder}: its {key} ({found[key]}) must be {wanted[key]}."
            )
    for lacking, keys in FROM_FLAGS.items():
        if found[lacking] is None:
            found |= {key: wanted[key] for key in keys}
    return found
