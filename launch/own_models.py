"""Models of their own kind, which an objective names: their flags, layout and parts of a run."""

from __future__ import annotations

import argparse
from typing import Any

from launch.cli import Settings
from mm_moe.arguments import parse_json
from mm_moe.data.schema import DataSource
from mm_moe.errors import ConfigError, ParallelismError
from mm_moe.models.folder import AnyConfig, AnyModel
from mm_moe.models.own import OwnModel, Processor
from mm_moe.models.processing import processors_for
from mm_moe.registry import MODELS, OBJECTIVES
from mm_moe.training import runtime
from mm_moe.training.own_objective import StatefulObjective
from mm_moe.training.trainer import MultimodalTrainer


def own_model(objective: str) -> type[OwnModel] | None:
    """The class of the model that an objective trains; None for a backbone with a head."""
    # an objective from outside need not say
    model_type = getattr(OBJECTIVES.resolve(objective), "model_type", None)
    return None if model_type is None else MODELS.resolve(model_type)


def check_own_model(values: argparse.Namespace, source: DataSource, *, ep_size: int) -> int:
    """Refuse flags that a model of its own kind does not go with, before anything is written.

    Returns:
        The expert-parallel size of the run.

    Raises:
        ConfigError: a flag of models with a backbone, or `--model_config` for one.
        ParallelismError: `--ep_size` does not divide experts or processes.
    """
    kind = own_model(values.objective)
    options = parse_json("model_config", values.model_config)
    if kind is None:
        if options:
            raise ConfigError(
                f"--model_config is for objectives with a model of their own, and "
                f"{values.objective!r} trains --backbone {values.backbone}; take --backbone_config."
            )
        return ep_size
    given = [
        name
        for name in ("experts_over", "lora_r", "interaction_experts", "keep_head")
        if getattr(values, name)
    ]
    given += [f"prompt {name}" for name in [values.prompt, *values.compare_with] if name != "none"]
    given += ["moe_enable true"] * bool(values.moe_enable)
    if given:
        raise ConfigError(
            f"--{given[0]} does not go with --objective {values.objective}, whose model has no "
            "backbone; leave it out (--moe_enable false, --prompt none)."
        )
    kind.config_for(source, options)
    return _layout(values, kind.count_experts(source))


def _layout(values: argparse.Namespace, experts: int) -> int:
    """The processes that share the experts: as many as fit, where the flag does not say."""
    world = runtime.world_size()
    common = [n for n in range(1, experts + 1) if experts % n == 0 and world % n == 0]
    if values.ep_size == 0:
        local = runtime.local_world_size()
        return max(n for n in common if local % n == 0)
    if values.ep_size not in common:
        raise ParallelismError(
            f"--ep_size {values.ep_size} must divide the {experts} experts of the model and the "
            f"{world} processes; possible: {', '.join(map(str, common))}."
        )
    return int(values.ep_size)


def own_config(settings: Settings, source: DataSource) -> AnyConfig | None:
    """The configuration of a model of its own kind; None for a backbone with a head."""
    kind = own_model(settings.run.objective)
    if kind is None:
        return None
    return kind.config_for(source, parse_json("model_config", settings.model.model_config))


def processors_of(settings: Settings, model: AnyModel) -> dict[str, Processor]:
    """One processor per modality."""
    if isinstance(model, OwnModel):
        return model.processors()
    source = settings.model.tokenizer or settings.model.pretrained
    return processors_for(model.config, source=source)


def prepare_objective(objective: Any, model: AnyModel, settings: Settings) -> None:
    """Let an objective with a state make what needs the model."""
    if isinstance(objective, StatefulObjective):
        training = settings.training
        objective.prepare(model, device=training.device, seed=training.seed)


def carry_objective(objective: Any, trainer: MultimodalTrainer) -> None:
    """Put the state of an objective into the checkpoints, and let it hear of the steps."""
    if isinstance(objective, StatefulObjective):
        trainer.carried |= objective.carried()
        for callback in objective.callbacks():
            trainer.add_callback(callback)
