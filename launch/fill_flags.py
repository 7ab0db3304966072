"""The flags of fills, checked before anything is written."""

from __future__ import annotations

import argparse
import math

from mm_moe.arguments import parse_json
from mm_moe.data.schema import DataSource
from mm_moe.errors import ConfigError
from mm_moe.models.fill_start import check_fill_options
from mm_moe.moe.parallel import check_layout, default_ep_size
from mm_moe.registry import FILLS
from mm_moe.training import runtime


def fill_layout(values: argparse.Namespace, source: DataSource, *, ep_size: int) -> int:
    """The expert-parallel size of a run whose fill may have experts, too.

    Args:
        values: the flags; `values.ep_size` is 0 where the size is free.
        source: the data set, whose modalities decide how many experts there are.
        ep_size: what fits the other sparse layers.

    Raises:
        ConfigError: an unknown fill or option, or a fill where there can be none.
        ParallelismError: the asked size does not divide the fill's experts.
    """
    options = parse_json("fill_config", values.fill_config)
    if values.fill is None:
        if options:
            raise ConfigError("--fill_config is about a fill; add --fill NAME.")
        return ep_size
    check_fill_options(values.fill, options)
    if values.experts_over:
        raise ConfigError(
            f"--fill {values.fill} is for one model; members of --experts_over take part only "
            "where their modalities are there. Leave one of them out."
        )
    if len(source.modalities) < 2:
        raise ConfigError(
            f"--fill {values.fill} fills what a sample lacks from what it has, and data set "
            f"{source.name!r} has {', '.join(source.modalities)} alone; leave out --fill."
        )
    count = FILLS.resolve(values.fill).count_experts(len(source.modalities), options)
    if not count:
        return ep_size
    world = runtime.world_size()
    if values.ep_size == 0:
        others = [*values.num_experts] if values.moe_enable else []
        return default_ep_size(
            num_experts=math.gcd(
                count, *others, *([ep_size] if values.interaction_experts else [])
            ),
            world_size=world,
            local_world_size=runtime.local_world_size(),
        )
    check_layout(num_experts=count, ep_size=values.ep_size, world_size=world)
    return values.ep_size
