"""The flags of interaction experts, settled and checked before anything is written."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from launch.checks import typed_flags
from launch.cli import read_recipe
from launch.scoring import num_outputs
from mm_moe.arguments import MoEArguments, parse_json
from mm_moe.data.schema import DataSource
from mm_moe.errors import ConfigError, ParallelismError
from mm_moe.models.interaction_settings import InteractionSettings
from mm_moe.moe.parallel import check_layout, default_ep_size
from mm_moe.training import runtime

OBJECTIVE = "interaction"


def interaction_fields(moe: MoEArguments) -> dict[str, Any] | None:
    """The configuration's `interaction_experts`."""
    if not moe.interaction_experts:
        return None
    return InteractionSettings.from_dict(
        parse_json("interaction_config", moe.interaction_config)
    ).asdict()


def settle_interaction_experts(values: argparse.Namespace, argv: list[str]) -> None:
    """Let `--interaction_experts` choose its objective, and the table's labels and kinds agree.

    Raises:
        ConfigError: settings that cannot work, or flags that contradict each other.
    """
    if not values.interaction_experts:
        if values.interaction_config or values.objective == OBJECTIVE:
            flag = "interaction_config" if values.interaction_config else "objective interaction"
            raise ConfigError(
                f"--{flag} is about interaction experts; add --interaction_experts true."
            )
        return
    if values.moe_backend != "ours":
        raise ConfigError(
            f"interaction experts need --moe_backend ours, not {values.moe_backend!r}, whose layer "
            "has no such router."
        )
    given = typed_flags(argv) | set(read_recipe(values.config))
    if "objective" not in given:
        values.objective = OBJECTIVE
    options = parse_json("interaction_config", values.interaction_config)
    labels = values.interaction_labels.removesuffix("_soft")
    if "interaction_labels" in given:
        options.setdefault("kinds", labels)
    settings = InteractionSettings.from_dict(options)
    if "interaction_labels" in given and settings.kinds != labels:
        raise ConfigError(
            f"--interaction_labels {values.interaction_labels} and kinds {settings.kinds} in "
            "--interaction_config differ; drop one."
        )
    if "interaction_labels" not in given:
        values.interaction_labels = settings.kinds
    values.interaction_config = json.dumps(options)


def interaction_layout(values: argparse.Namespace, source: DataSource, *, ep_size: int) -> int:
    """The expert-parallel size of a run with interaction experts, whose number the data decide.

    Args:
        values: the flags; `values.ep_size` is 0 where the size is free.
        source: the data set.
        ep_size: what fits the other sparse layers.

    Raises:
        ConfigError: data that the experts cannot be about.
        ParallelismError: the asked size does not divide the experts.
    """
    if not values.interaction_experts:
        return ep_size
    if source.problem_type == "none":
        raise ConfigError(
            f"interaction experts need labels, and {values.dataset!r} has none; leave out "
            "--interaction_experts."
        )
    settings = InteractionSettings.from_dict(
        parse_json("interaction_config", values.interaction_config)
    )
    kinds = settings.names(source.modalities, num_labels=num_outputs(source))
    count = len(kinds) * settings.experts_per_kind
    world = runtime.world_size()
    if values.ep_size == 0:
        other = math.gcd(*values.num_experts) if values.moe_enable else count
        return default_ep_size(
            num_experts=math.gcd(count, other),
            world_size=world,
            local_world_size=runtime.local_world_size(),
        )
    if count % values.ep_size:
        per_kind = values.ep_size // math.gcd(len(kinds), values.ep_size)
        raise ParallelismError(
            f"the {count} interaction experts ({', '.join(kinds)}, {settings.experts_per_kind} of "
            f"each) must be a multiple of --ep_size ({values.ep_size}); try "
            f"--interaction_config '{{\"experts_per_kind\": {per_kind}}}'."
        )
    check_layout(num_experts=count, ep_size=values.ep_size, world_size=world)
    return values.ep_size
