"""The flags of the objective: what they build, and what can be refused before a run exists."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from launch.check_blip2 import check_stage_one, stage_one_fields
from launch.checks import typed_flags
from launch.cli import Settings
from mm_moe.arguments import parse_json
from mm_moe.errors import ConfigError
from mm_moe.registry import OBJECTIVES, nearest
from mm_moe.training.grad_cache import FeatureObjective, GradCache

SIGLIP = "siglip"


def settle_objective(values: argparse.Namespace, argv: list[str]) -> None:
    """Read open_clip's flags, and refuse options that the objective does not have.

    Raises:
        ConfigError: an unknown option or a value that cannot work; open_clip's approximations of
            the loss; `--grad_cache` for a loss that is no function of features.
    """
    typed = typed_flags(argv)
    if values.siglip:
        if "objective" in typed and values.objective not in ("contrastive", SIGLIP):
            raise ConfigError(
                f"--siglip means --objective siglip, --objective says {values.objective!r}; drop "
                "one."
            )
        values.objective = SIGLIP
    for flag, what in (
        ("local_loss", "every rank computes the rows of its own samples only"),
        ("gather_with_grad", "gradients go through the exchange, so that they are exact"),
    ):
        if not getattr(values, flag):
            raise ConfigError(f"--{flag} false: {what} always; leave the flag out.")
    objective = _build(values.objective, values.objective_config, problem_type="none")
    check_stage_one(values, objective)
    if values.grad_cache and not isinstance(objective, FeatureObjective):
        raise ConfigError(
            f"--grad_cache true keeps the negatives of contrastive objectives, and "
            f"{values.objective!r} has none: accumulation without it gives its big batch already. "
            "Leave it out."
        )


def plain_objective(settings: Settings, *, problem_type: str) -> Any:
    """The objective of a run, of one micro-batch at a time."""
    config = settings.objective.objective_config
    return _build(settings.run.objective, config, problem_type=problem_type)


def objective_of(settings: Settings, *, problem_type: str) -> Any:
    """The objective of a run."""
    objective = plain_objective(settings, problem_type=problem_type)
    return GradCache(objective) if settings.objective.grad_cache else objective


def logit_fields(settings: Settings) -> dict[str, Any]:
    """What the scale and bias of the model's logits start from, as configuration fields."""
    objective = plain_objective(settings, problem_type="none")
    if not isinstance(objective, FeatureObjective):
        return {}
    scale, bias = objective.logit_start
    return {"logit_scale_init": scale, "logit_bias_init": bias}


def backbone_fields(settings: Settings) -> dict[str, Any]:
    """The backbone settings that the objective needs."""
    return stage_one_fields(plain_objective(settings, problem_type="none"))


def _build(name: str, config: str | None, *, problem_type: str) -> Any:
    """The objective `name` with its options.

    Raises:
        ConfigError: an option that it does not have, with the nearest ones, or a wrong value.
    """
    kind: Any = OBJECTIVES.resolve(name)
    options = parse_json("objective_config", config)
    known = list(options)  # of one from outside only its own call knows
    if dataclasses.is_dataclass(kind):
        known = [field.name for field in dataclasses.fields(kind) if field.name != "problem_type"]
    for option in options:
        if option not in known:
            hint = nearest(option, known) if known else "it has none."
            raise ConfigError(f"unknown option {option!r} of objective {name!r}; {hint}")
    build: Callable[..., Any] = kind
    try:
        return build(problem_type=problem_type, **options)
    except TypeError as error:
        raise ConfigError(f"--objective_config for {name!r}: {error}.") from error
